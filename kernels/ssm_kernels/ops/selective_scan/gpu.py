"""The selective scan on a GPU: host side of the Triton kernels, as PyTorch operators with gradients."""

# K directions (1 or 2), B batch, L tokens, D channels, N state size, G groups of DG channels, T tiles of BD channels

from __future__ import annotations

from itertools import repeat

import torch
import triton
from torch import Tensor

from ...triton_utils import dense_rows, empty, fast_math, on_device, widest_pack
from .autograd import define_scan
from .gpu_backward import scan_backward_kernel
from .gpu_forward import RowStrides, Shape, chunk_state_kernel, pass_state_kernel, scan_forward_kernel

BLOCK = 64  # tokens between two states kept for the backward pass
MAX_REGISTERS = {32: 128, 64: 168}
MAX_BACKWARD_REGISTERS = 255  # all there are: left alone, ptxas may aim at 128 for 4 warps, and spill
BACKWARD_STEPS = 2  # states that the backward kernel holds in registers
MIN_CHUNK = 32
SINGLE_PASS_PROGRAMS = (
    384  # modelled: from here on one chunk per sequence is faster than the doubled arithmetic of three
)
MAX_BACKWARD_PROGRAMS = 1056  # bounds the scratch memory; further work is looped over
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

    def __init__(self, u, dt, A, B, C, D, z, dt_bias, dt_softplus, reverse):
        self.K, self.B, self.L, self.D = u.shape
        self.N = A.shape[-1]
        self.G = max(x.shape[3] if x.dim() == 5 else 1 for x in (B, C))
        self.u, self.dt = dense_rows(u), dense_rows(dt)
        self.z = None if z is None else dense_rows(z)
        self.A = dense_rows(A)
        self.Dw = None if D is None else dense_rows(D)
        self.bias = None if dt_bias is None else dense_rows(dt_bias)
        self.s_u, self.s_dt, self.s_A = self.u.stride()[:2], self.dt.stride()[:2], self.A.stride()
        self.s_z, row_z = (0, 0) if self.z is None else (self.z.stride(0), self.z.stride(1))
        self.s_D = 0 if self.Dw is None else self.Dw.stride(0)
        self.s_bias = 0 if self.bias is None else self.bias.stride(0)
        self.Bx, self.s_B, row_B, pack_B = self._token_matrix(B)
        self.Cx, self.s_C, row_C, pack_C = self._token_matrix(C)
        self.rows = RowStrides(u=self.u.stride(2), dt=self.dt.stride(2), z=row_z, B=row_B, C=row_C, dy=0)
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
        x = dense_rows(x)
        s_k, s_b, s_l, s_g, _ = x.stride()
        if x.shape[3] == 1:
            s_g = 0
        return x, (s_k, s_b, s_g), s_l, widest_pack(self.N, x, (s_k, s_b, s_l, s_g))

    def tiled(self, width: int) -> Shape:
        """The shape with tiles of so many channels."""
        return self.shape._replace(BD=width, T=self.G * -(-self.dg // width))


def _forward(
    u: Tensor, dt: Tensor, A: Tensor, B: Tensor, C: Tensor, D: Tensor | None, z: Tensor | None, dt_bias: Tensor | None,
    dt_softplus: bool, reverse: bool, scale: float, save: bool,
) -> tuple[Tensor, Tensor, Tensor]:  # fmt: skip
    x = Operands(u, dt, A, B, C, D, z, dt_bias, dt_softplus, reverse)
    width = 64 if torch.version.hip or (x.N <= 16 and x.dg % 64 == 0 and x.B * x.D // 64 >= TARGET_PROGRAMS) else 32
    shape = x.tiled(width)
    block, per_chunk = plan_chunks(x.L, x.B * shape.T, BLOCK if save else 0)
    n_states = -(-x.L // block)
    n_chunks = -(-n_states // per_chunk)
    y = empty((x.B, x.L, x.D), u.dtype, u)
    acc = y if x.K == 1 or u.dtype == torch.float32 else empty((x.B, x.L, x.D), torch.float32, u)
    last = empty((x.K, x.B, x.D, x.N), torch.float32, u)
    states = empty((x.K, x.B, n_states, x.D, x.N) if save or n_chunks > 1 else (0,), torch.float32, u)
    with on_device(u):
        if n_chunks > 1:
            sums = empty((x.K, x.B, n_chunks, x.D), torch.float32, u)
            chunk_state_kernel[(shape.T * (n_chunks - 1) * x.B * x.K,)](
                x.u, x.dt, x.A, x.Bx, x.z, x.bias, states, sums, scale, x.B, x.L, block * per_chunk, per_chunk,
                n_chunks, n_states, x.s_u, x.s_dt, x.s_A, x.s_B, x.s_z, x.s_bias, x.rows.u, x.rows.B, shape.PACK_B,
                False, x.rows, shape, _unroll(shape), **_options(shape),
            )  # fmt: skip
            _pass_states(x, shape, states, sums, None, per_chunk, n_chunks, n_states, False)
        scan_forward_kernel[(shape.T * n_chunks * x.B,)](
            x.u, x.dt, x.A, x.Bx, x.Cx, x.Dw, x.z, x.bias, y, acc, states, last, scale, x.B, x.L, block, per_chunk,
            n_chunks, n_states, x.s_u, x.s_dt, x.s_A, x.s_B, x.s_C, x.s_D, x.s_z, x.s_bias, n_chunks > 1, save,
            x.rows, shape, _unroll(shape), **_options(shape),
        )  # fmt: skip
    return y, last, states.flatten() if save else states.new_empty(0)


def _unroll(shape: Shape) -> int:
    """Steps per turn of the loop: loads of one turn are in flight together; more cost registers and compile time."""
    return 1 if shape.N > 16 else 2 if shape.BD == 64 else 4


def _options(shape: Shape) -> dict[str, int | bool]:
    options = {'num_warps': 1, 'enable_fp_fusion': True}
    if shape.FAST and shape.N <= 16:  # left alone, ptxas takes up to 238 registers to gain nothing in the loop
        options['maxnreg'] = MAX_REGISTERS[shape.BD]
    return options


def _pass_states(
    x: Operands, shape: Shape, states: Tensor, sums: Tensor, init: Tensor | None, per_chunk: int, n_chunks: int,
    n_states: int, adjoint: bool,
) -> None:  # fmt: skip
    """Turns the local ends of chunks into true starts, in place."""
    BX = 64
    pass_state_kernel[(triton.cdiv(x.D * x.N, BX) * x.B * x.K,)](
        x.A, states, sums, init, x.B, per_chunk, n_chunks, n_states, x.s_A, init is not None, adjoint, shape,
        BX, 8, num_warps=1, enable_fp_fusion=True,
    )  # fmt: skip


def _backward(
    dy: Tensor | None, dlast: Tensor | None,
    u: Tensor, dt: Tensor, A: Tensor, B: Tensor, C: Tensor, D: Tensor | None, z: Tensor | None, dt_bias: Tensor | None,
    states: Tensor, dt_softplus: bool, reverse: bool, scale: float,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor]:  # fmt: skip
    x = Operands(u, dt, A, B, C, D, z, dt_bias, dt_softplus, reverse)
    dy = torch.zeros_like(u[0]) if dy is None else dense_rows(dy)
    rows = x.rows._replace(dy=dy.stride(1))
    const_B, const_C = B.dim() == 3, C.dim() == 3
    shape, BN, steps, warps = _tile_backward(x, const_B or const_C)
    block, per_chunk = plan_chunks(x.L, x.K * x.B * shape.T, BLOCK)
    n_states = -(-x.L // block)
    n_chunks = -(-n_states // per_chunk)
    n_items = shape.T * n_chunks * x.B * x.K
    n_programs = -(-n_items // -(-n_items // MAX_BACKWARD_PROGRAMS))
    parts = x.B * n_chunks

    du, ddt = (empty((x.K, x.B, x.L, x.D), u.dtype, u) for _ in range(2))
    dz = None if z is None else empty((x.K, x.B, x.L, x.D), u.dtype if x.K == 1 else torch.float32, u)
    dA = empty((x.K, parts, x.D, x.N), torch.float32, u)
    dD, dbias = (None if p is None else empty((x.K, parts, x.D), torch.float32, u) for p in (D, dt_bias))
    dB, dC = (
        empty((x.K, parts, x.D, x.N) if const else (x.K, x.B, x.L, shape.T, x.N), torch.float32, u)
        for const in (const_B, const_C)
    )
    scratch = empty((n_programs, -(-block // steps), shape.BD, BN), torch.float32, u)
    adjoint = None if dlast is None else dlast.to(torch.float32).contiguous()
    with on_device(u):
        if n_chunks > 1:
            adjoint = _pass_adjoints(x, dy, rows, adjoint, scale, block * per_chunk, n_chunks)
        scan_backward_kernel[(n_programs,)](
            x.u, x.dt, x.A, _constant(B) if const_B else x.Bx, _constant(C) if const_C else x.Cx, x.Dw, x.z, x.bias,
            dy, states, adjoint, scratch, du, ddt, dz, dB, dC, dA, dD, dbias, scale, x.B, x.L, block, per_chunk,
            n_chunks, n_states, n_items, n_programs, x.s_u, x.s_dt, x.s_A, x.s_B, x.s_C, x.s_D, x.s_z, x.s_bias,
            dy.stride(0), adjoint is not None, rows, shape, BN, steps, num_warps=warps, enable_fp_fusion=True,
            **({'maxnreg': MAX_BACKWARD_REGISTERS} if shape.FAST else {}),
        )  # fmt: skip

    dz = _sum_of_directions(dz, z, u)
    dA, dB, dC, dD, dbias = map(_total, (dA, dB, dC, dD, dbias), (A, B, C, D, dt_bias), repeat(u))
    return du, ddt, dA, dB, dC, dD, dz, dbias


def _tile_backward(x: Operands, constant: bool) -> tuple[Shape, int, int, int]:
    """What the backward kernel is compiled for, its padded N, the states it holds in registers, and warps.

    A warp takes a tile of 8 states by 32 or 64 channels, or 16 by 32. Gradients of constant B and C stay in registers
    through a whole chunk, which takes twice the warps.
    """
    BN = max(8, triton.next_power_of_2(x.N))
    shape = x.tiled(64 if BN == 8 and x.dg % 64 == 0 and not constant else 32)
    warps = max(1, BN // 8 if BN > 16 else 1) * (2 if constant else 1)
    if warps > 8:  # 16 warps could have 128 registers a thread only, and would spill
        return shape, BN, 1, 8
    return shape, BN, BACKWARD_STEPS, warps


def _pass_adjoints(
    x: Operands, dy: Tensor, rows: RowStrides, last: Tensor | None, scale: float, chunk: int, n_chunks: int
) -> Tensor:
    """Gradients (K, B, n_chunks, D, N) of the state at the end of every chunk of so many tokens, from ``last`` on."""
    shape = x.tiled(64 if torch.version.hip else 32)
    adjoint = empty((x.K, x.B, n_chunks, x.D, x.N), torch.float32, x.u)
    sums = empty((x.K, x.B, n_chunks, x.D), torch.float32, x.u)
    chunk_state_kernel[(shape.T * (n_chunks - 1) * x.B * x.K,)](
        dy, x.dt, x.A, x.Cx, x.z, x.bias, adjoint, sums, scale, x.B, x.L, chunk, 1, n_chunks, n_chunks,
        (0, dy.stride(0)), x.s_dt, x.s_A, x.s_C, x.s_z, x.s_bias, rows.dy, rows.C, shape.PACK_C, True, rows, shape,
        _unroll(shape), **_options(shape),
    )  # fmt: skip
    _pass_states(x, shape, adjoint, sums, last, 1, n_chunks, n_chunks, True)
    return adjoint


def _total(partial: Tensor | None, like: Tensor | None, u: Tensor) -> Tensor:
    """The sum of the programs' partial sums, in a fixed order, as the gradient of ``like``; of size 0 without it."""
    if partial is None or like is None:
        return u.new_empty(0)
    if like.dim() == 5:
        return partial.unflatten(3, (like.shape[3], -1)).sum(4).to(like.dtype)
    return partial.sum(1).to(like.dtype)


def _sum_of_directions(dz: Tensor | None, z: Tensor | None, u: Tensor) -> Tensor:
    if dz is None or z is None:
        return u.new_empty(0)
    return dz.view(z.shape) if dz.shape[0] == 1 else dz.sum(0).to(z.dtype)


def _constant(x: Tensor) -> Tensor:
    return x.to(torch.float32).contiguous()


forward_op, backward_op, selective_scan_triton = define_scan('triton', _forward, _backward, block=BLOCK)
