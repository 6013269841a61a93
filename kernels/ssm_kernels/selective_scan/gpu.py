"""The selective scan on a GPU: host side of the Triton kernels, as PyTorch operators with gradients."""

# K directions (1 or 2), B batch, L tokens, D channels, N state size, G groups of DG channels, T tiles of BD channels

from __future__ import annotations

import torch
import triton
from torch import Tensor

from ..triton_utils import empty, fast_math, on_device, widest_pack
from .gpu_forward import RowStrides, Shape, chunk_state_kernel, pass_state_kernel, scan_forward_kernel

MAX_STATE_SIZE = 64
BLOCK = 64  # tokens between two states kept for the backward pass
MIN_CHUNK = 32
SINGLE_PASS_PROGRAMS = 384  # modelled: from here on one chunk per sequence is faster than the doubled arithmetic of three
TARGET_PROGRAMS = 1056  # 8 warps on each of the 132 multiprocessors of an H100


def plan_chunks(length: int, programs: int, block: int) -> tuple[int, int]:
    """Tokens per block and blocks per chunk, when one chunk per sequence would make so many programs.

    ``block`` fixes the block, 0 makes a chunk one block. A formula, not a search, so that two runs cut alike.
    """
    n_chunks = 1 if programs >= SINGLE_PASS_PROGRAMS else min(-(-TARGET_PROGRAMS // programs), -(-length // MIN_CHUNK))
    chunk = -(-length // n_chunks)
    if block:
        return block, -(-chunk // block)
    return -(-chunk // 8) * 8, 1


class Operands:
    """The tensors of one call as the kernels take them, with their strides."""

    def __init__(
        self,
        u: Tensor,
        dt: Tensor,
        A: Tensor,
        B: Tensor,
        C: Tensor,
        D: Tensor | None,
        z: Tensor | None,
        dt_bias: Tensor | None,
        dt_softplus: bool,
        reverse: bool,
    ) -> None:
        self.K, self.B, self.L, self.D = u.shape
        self.N = A.shape[-1]
        self.G = max(x.shape[3] if x.dim() == 5 else 1 for x in (B, C))
        self.u, self.dt = _dense_rows(u), _dense_rows(dt)
        self.z = None if z is None else _dense_rows(z)
        self.A = A
        self.Dw = None if D is None else _dense_rows(D)
        self.bias = None if dt_bias is None else _dense_rows(dt_bias)
        self.s_u, self.s_dt, self.s_A = self.u.stride()[:2], self.dt.stride()[:2], A.stride()
        self.s_z = 0 if z is None else self.z.stride(0)
        self.s_D = 0 if D is None else self.Dw.stride(0)
        self.s_bias = 0 if dt_bias is None else self.bias.stride(0)
        self.Bx, self.s_B, row_B, pack_B = self._token_matrix(B)
        self.Cx, self.s_C, row_C, pack_C = self._token_matrix(C)
        self.rows = RowStrides(
            u=self.u.stride(2),
            dt=self.dt.stride(2),
            z=0 if z is None else self.z.stride(1),
            B=row_B,
            C=row_C,
            dy=0,
        )
        self.dg = self.D // self.G
        self.shape = Shape(
            K=self.K,
            D=self.D,
            N=self.N,
            G=self.G,
            DG=self.dg,
            BD=0,
            T=0,
            PACK_B=pack_B,
            PACK_C=pack_C,
            HAS_D=D is not None,
            HAS_Z=z is not None,
            HAS_BIAS=dt_bias is not None,
            SOFTPLUS=dt_softplus,
            REVERSE=reverse,
            FAST=fast_math(u),
        )

    def _token_matrix(self, x: Tensor) -> tuple[Tensor, tuple[int, int, int], int, int]:
        """B or C, its strides (direction, batch, group), its stride from token to token, and values per load."""
        if x.dim() == 3:
            x = x.transpose(1, 2).to(torch.float32).contiguous()
            return x, (x.stride(0), 0, 0), 0, 0
        x = _dense_rows(x)
        s_k, s_b, s_l, s_g, _ = x.stride()
        if x.shape[3] == 1:
            s_g = 0
        return x, (s_k, s_b, s_g), s_l, widest_pack(self.N, x, (s_k, s_b, s_l, s_g))

    def tiled(self, width: int) -> Shape:
        return self.shape._replace(BD=width, T=self.G * -(-self.dg // width))


def _dense_rows(x: Tensor) -> Tensor:
    return x if x.stride(-1) == 1 else x.contiguous()


def _forward(
    u: Tensor,
    dt: Tensor,
    A: Tensor,
    B: Tensor,
    C: Tensor,
    D: Tensor | None,
    z: Tensor | None,
    dt_bias: Tensor | None,
    dt_softplus: bool,
    reverse: bool,
    scale: float,
    save: bool,
) -> tuple[Tensor, Tensor, Tensor]:
    x = Operands(u, dt, A, B, C, D, z, dt_bias, dt_softplus, reverse)
    width = 64 if torch.version.hip or (x.N <= 16 and x.dg % 64 == 0 and x.B * x.D // 64 >= TARGET_PROGRAMS) else 32
    shape = x.tiled(width)
    unroll = 4 if x.N <= 16 else 1
    block, per_chunk = plan_chunks(x.L, x.B * shape.T, BLOCK if save else 0)
    n_states = -(-x.L // block)
    n_chunks = -(-n_states // per_chunk)
    y = empty((x.B, x.L, x.D), u.dtype, u)
    acc = y if x.K == 1 or u.dtype == torch.float32 else empty((x.B, x.L, x.D), torch.float32, u)
    last = empty((x.K, x.B, x.N, x.D), torch.float32, u)
    states = empty((x.K, x.B, n_states, x.N, x.D) if save or n_chunks > 1 else (0,), torch.float32, u)
    with on_device(u):
        if n_chunks > 1:
            sums = empty((x.K, x.B, n_chunks, x.D), torch.float32, u)
            chunk_state_kernel[(shape.T * (n_chunks - 1) * x.B * x.K,)](
                x.u, x.dt, x.A, x.Bx, x.z, x.bias, states, sums, scale, x.B, x.L, block * per_chunk, per_chunk,
                n_chunks, n_states, x.s_u, x.s_dt, x.s_A, x.s_B, x.s_z, x.s_bias, x.rows.u, x.rows.B, shape.PACK_B,
                False, x.rows, shape, unroll, num_warps=1, enable_fp_fusion=True,
            )  # fmt: skip
            _pass_states(x, shape, states, sums, None, per_chunk, n_chunks, n_states, False)
        scan_forward_kernel[(shape.T * n_chunks * x.B,)](
            x.u, x.dt, x.A, x.Bx, x.Cx, x.Dw, x.z, x.bias, y, acc, states, last, scale, x.B, x.L, block, per_chunk,
            n_chunks, n_states, x.s_u, x.s_dt, x.s_A, x.s_B, x.s_C, x.s_D, x.s_z, x.s_bias, n_chunks > 1, save,
            x.rows, shape, unroll, num_warps=1, enable_fp_fusion=True,
        )  # fmt: skip
    return y, last.transpose(2, 3), states if save else states.new_empty(0)


def _pass_states(
    x: Operands,
    shape: Shape,
    states: Tensor,
    sums: Tensor,
    init: Tensor | None,
    per_chunk: int,
    n_chunks: int,
    n_states: int,
    adjoint: bool,
) -> None:
    s_init = (0, 0, 0, 0) if init is None else init.stride()
    tiles = triton.cdiv(x.D, 32)
    pass_state_kernel[(tiles * x.N * x.B * x.K,)](
        x.A, states, sums, init, x.B, per_chunk, n_chunks, n_states, x.s_A, s_init, init is not None, adjoint, shape,
        32, 8, num_warps=1, enable_fp_fusion=True,
    )  # fmt: skip
