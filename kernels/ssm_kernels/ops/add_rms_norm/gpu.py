"""Residual addition and RMSNorm on a GPU: Triton kernels, their host side, and PyTorch operators with gradients.

Source: RMSNorm, arXiv 1910.07467, equation 4. With s the new residual, r = 1 / sqrt(mean(s^2) + eps), o the gradient of
the output and g = o * weight:

    ds = r (g - s r^2 mean(g s)) + gradient of the stream itself        dweight = sum over tokens of o s r

Only r is kept beside the stream, which the next block keeps anyway. dweight needs no atomics: every program adds up its
own tokens, the host adds the programs in a fixed order, so two runs give the same bits.
"""

# T tokens, D channels

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from ...operators import define, refuse_second_derivative
from ...triton_utils import dense_rows, empty, on_device

FORWARD_TILE, BACKWARD_TILE = 2048, 1024  # values that a program holds at a time, if a row is not longer
MAX_BACKWARD_PROGRAMS = 1056  # 8 on each of the 132 multiprocessors of an H100; bounds the partial sums


@triton.jit(do_not_specialize=['T'])
def norm_forward_kernel(
    x, residual, weight, out, stream, rstd, eps, T, s_x, s_r, s_w, HAS_RESIDUAL: tl.constexpr,
    STORE: tl.constexpr, D: tl.constexpr, BT: tl.constexpr, BD: tl.constexpr,
):  # fmt: skip
    """BT tokens, whole rows in registers: every value is read once."""
    o_t = tl.program_id(0).to(tl.int64) * BT + tl.arange(0, BT)
    o_d = tl.arange(0, BD)
    m_d = o_d < D
    m = (o_t < T)[:, None] & m_d[None, :]
    b_s = tl.load(x + o_t[:, None] * s_x + o_d[None, :], mask=m, other=0.0).to(tl.float32)
    if HAS_RESIDUAL:
        b_s += tl.load(residual + o_t[:, None] * s_r + o_d[None, :], mask=m, other=0.0)
    b_w = tl.load(weight + o_d * s_w, mask=m_d, other=0.0).to(tl.float32)
    b_r = tl.rsqrt(tl.sum(b_s * b_s, axis=1) / D + eps)
    o = o_t[:, None] * D + o_d[None, :]
    if STORE:
        tl.store(stream + o, b_s, mask=m)
    tl.store(out + o, (b_s * b_r[:, None] * b_w[None, :]).to(out.dtype.element_ty), mask=m)
    tl.store(rstd + o_t, b_r, mask=o_t < T)


@triton.jit(do_not_specialize=['T', 'n_tiles', 'n_programs'])
def norm_backward_kernel(
    dout, dstream, stream, rstd, weight, dx, dresidual, parts, T, n_tiles, n_programs, s_do, s_ds, s_s, s_w,
    HAS_DSTREAM: tl.constexpr, STORE_DX: tl.constexpr, STORE_DRESIDUAL: tl.constexpr, D: tl.constexpr,
    BT: tl.constexpr, BD: tl.constexpr,
):  # fmt: skip
    """Every n_programs-th tile of BT tokens: the share of dweight is stored once, not once a tile."""
    pid = tl.program_id(0)
    o_d = tl.arange(0, BD)
    m_d = o_d < D
    b_w = tl.load(weight + o_d * s_w, mask=m_d, other=0.0).to(tl.float32)
    b_dw = tl.zeros([BT, BD], tl.float32)
    for tile in range(pid, n_tiles, n_programs):
        o_t = (tile * BT + tl.arange(0, BT)).to(tl.int64)
        m = (o_t < T)[:, None] & m_d[None, :]
        b_r = tl.load(rstd + o_t, mask=o_t < T, other=0.0)
        b_n = tl.load(stream + o_t[:, None] * s_s + o_d[None, :], mask=m, other=0.0).to(tl.float32) * b_r[:, None]
        b_o = tl.load(dout + o_t[:, None] * s_do + o_d[None, :], mask=m, other=0.0).to(tl.float32)
        b_dw += b_o * b_n
        b_g = b_o * b_w[None, :]
        b_ds = (b_g - b_n * (tl.sum(b_g * b_n, axis=1) / D)[:, None]) * b_r[:, None]
        if HAS_DSTREAM:
            b_ds += tl.load(dstream + o_t[:, None] * s_ds + o_d[None, :], mask=m, other=0.0)
        o = o_t[:, None] * D + o_d[None, :]
        if STORE_DX:
            tl.store(dx + o, b_ds.to(dx.dtype.element_ty), mask=m)
        if STORE_DRESIDUAL:
            tl.store(dresidual + o, b_ds, mask=m)
    tl.store(parts + pid.to(tl.int64) * D + o_d, tl.sum(b_dw, axis=0), mask=m_d)


def _tile(dim: int, values: int) -> tuple[int, int, int]:
    """Tokens and channels of a tile of so many values, and warps for it."""
    width = max(32, triton.next_power_of_2(dim))
    return max(1, values // width), width, min(16, max(4, width // 512))


def _starts_with(x: Tensor, residual: Tensor | None) -> bool:
    """Whether the new residual is x itself, so that nobody writes it."""
    return residual is None and x.dtype == torch.float32


def _forward(
    x: Tensor, residual: Tensor | None, weight: Tensor, eps: float, out_dtype: torch.dtype
) -> tuple[Tensor, Tensor, Tensor]:
    x = dense_rows(x)
    residual = None if residual is None else dense_rows(residual)
    tokens, dim = x.shape
    store = not _starts_with(x, residual)
    out = empty((tokens, dim), out_dtype, x)
    stream = empty((tokens, dim) if store else (0,), torch.float32, x)
    rstd = empty((tokens,), torch.float32, x)
    BT, BD, warps = _tile(dim, FORWARD_TILE)
    with on_device(x):
        norm_forward_kernel[(triton.cdiv(tokens, BT),)](
            x, residual, weight, out, stream, rstd, eps, tokens, x.stride(0),
            0 if residual is None else residual.stride(0), weight.stride(0), residual is not None, store, dim, BT, BD,
            num_warps=warps, enable_fp_fusion=True,
        )  # fmt: skip
    return out, stream, rstd


def _backward(
    dout: Tensor,
    dstream: Tensor | None,
    stream: Tensor,
    rstd: Tensor,
    weight: Tensor,
    x_dtype: torch.dtype,
    added: bool,
) -> tuple[Tensor, Tensor, Tensor]:
    """Gradients of x where its dtype is not float32 or nothing was added to it, of the residual, and of weight."""
    dout, stream = dense_rows(dout), dense_rows(stream)
    dstream = None if dstream is None else dense_rows(dstream)
    tokens, dim = stream.shape
    store_dx = not added or x_dtype != torch.float32
    dx = empty((tokens, dim) if store_dx else (0,), x_dtype, stream)
    dresidual = empty((tokens, dim) if added else (0,), torch.float32, stream)
    BT, BD, warps = _tile(dim, BACKWARD_TILE)
    n_tiles = triton.cdiv(tokens, BT)
    programs = min(n_tiles, MAX_BACKWARD_PROGRAMS)
    parts = empty((programs, dim), torch.float32, stream)
    with on_device(stream):
        norm_backward_kernel[(programs,)](
            dout, dstream, stream, rstd, weight, dx, dresidual, parts, tokens, n_tiles, programs, dout.stride(0),
            0 if dstream is None else dstream.stride(0), stream.stride(0), weight.stride(0), dstream is not None,
            store_dx, added, dim, BT, BD, num_warps=warps, enable_fp_fusion=True,
        )  # fmt: skip
    return dx, dresidual, parts.sum(0).to(weight.dtype)


def _forward_fake(x, residual, weight, eps, out_dtype):
    return (
        x.new_empty(x.shape, dtype=out_dtype),
        x.new_empty((0,) if _starts_with(x, residual) else x.shape, dtype=torch.float32),
        x.new_empty(x.shape[0], dtype=torch.float32),
    )


def _backward_fake(dout, dstream, stream, rstd, weight, x_dtype, added):
    return (
        stream.new_empty((0,) if added and x_dtype == torch.float32 else stream.shape, dtype=x_dtype),
        stream.new_empty(stream.shape if added else (0,), dtype=torch.float32),
        weight.new_empty(weight.shape),
    )


forward_op = define(
    'add_rms_norm_triton',
    _forward,
    _forward_fake,
    '(Tensor x, Tensor? residual, Tensor weight, float eps, ScalarType out_dtype) -> (Tensor, Tensor, Tensor)',
)
backward_op = define(
    'add_rms_norm_triton_backward',
    _backward,
    _backward_fake,
    '(Tensor dout, Tensor? dstream, Tensor stream, Tensor rstd, Tensor weight, ScalarType x_dtype, bool added)'
    ' -> (Tensor, Tensor, Tensor)',
)


def _setup_context(ctx, inputs, output):
    x, residual, weight, _, _ = inputs
    _, stream, rstd = output
    ctx.set_materialize_grads(False)
    ctx.mark_non_differentiable(rstd)
    ctx.x_dtype, ctx.added, ctx.starts = x.dtype, residual is not None, _starts_with(x, residual)
    ctx.save_for_backward(x if ctx.starts else stream, rstd, weight)


def _autograd(ctx, dout, dstream, drstd):
    stream, rstd, weight = ctx.saved_tensors
    dstream = None if ctx.starts else dstream  # that output is empty then
    if dout is None and dstream is None:
        return None, None, None, None, None
    if dout is None:
        dx, dresidual, dweight = dstream.to(ctx.x_dtype), dstream, torch.zeros_like(weight)
    else:
        dx, dresidual, dweight = backward_op(dout, dstream, stream, rstd, weight, ctx.x_dtype, ctx.added)
        dx = dresidual if ctx.added and ctx.x_dtype == torch.float32 else dx
    return dx, dresidual if ctx.added else None, dweight, None, None


torch.library.register_autograd(forward_op, _autograd, setup_context=_setup_context)
refuse_second_derivative(backward_op)


def add_rms_norm_triton(
    x: Tensor, residual: Tensor | None, weight: Tensor, eps: float, out_dtype: torch.dtype
) -> tuple[Tensor, Tensor]:
    """As :func:`add_rms_norm_reference`, for rows of up to 8192 channels."""
    out, stream, _ = forward_op(x, residual, weight, eps, out_dtype)
    return out, x if _starts_with(x, residual) else stream
