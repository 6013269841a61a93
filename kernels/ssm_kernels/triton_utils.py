"""Parts that the Triton kernels share: fast elementary functions, rows of packed scalars, launching, scratch memory."""

from __future__ import annotations

import contextlib
import os
from contextlib import AbstractContextManager

import torch
import triton
import triton.language as tl
from torch import Tensor

INTERPRETED = os.environ.get('TRITON_INTERPRET', '0') == '1'
LOG2E = tl.constexpr(1.4426950408889634)
LOG2E_REST = tl.constexpr(1.925963033500919e-08)  # log2(e) less its float32 rounding
LN2 = tl.constexpr(0.6931471805599453)
NAN_STAYS = tl.constexpr(tl.PropagateNan.ALL)


def fast_math(x: Tensor) -> bool:
    """Whether kernels on x may use NVIDIA's approximate instructions, which are inline PTX."""
    return not INTERPRETED and x.device.type == 'cuda' and torch.version.hip is None


def on_device(x: Tensor) -> AbstractContextManager:
    """Makes x's device the current one, as Triton launches there."""
    if x.device.type == 'cpu':
        return contextlib.nullcontext()
    return torch.get_device_module(x.device).device(x.device)


def empty(shape: tuple[int, ...], dtype: torch.dtype, like: Tensor) -> Tensor:
    """Every buffer of the Triton kernels comes from here, uninitialised, so that tests can poison them."""
    return torch.empty(shape, dtype=dtype, device=like.device)


def dense_rows(x: Tensor) -> Tensor:
    """x with neighbouring channels next to each other, as the kernels take them; other strides are free."""
    return x if x.stride(-1) == 1 else x.contiguous()


@triton.jit
def exp2(x, FAST: tl.constexpr):
    """2^x in float32. FAST: one instruction on NVIDIA, 2 units in the last place, denormals are zero."""
    if FAST:
        return tl.inline_asm_elementwise(
            'ex2.approx.ftz.f32 $0, $1;', '=f,f', [x], dtype=tl.float32, is_pure=True, pack=1
        )
    else:
        return tl.exp2(x)


@triton.jit
def reciprocal(x, FAST: tl.constexpr):
    """1 / x in float32. FAST: one instruction on NVIDIA, 1 unit in the last place, denormals are zero."""
    if FAST:
        return tl.inline_asm_elementwise(
            'rcp.approx.ftz.f32 $0, $1;', '=f,f', [x], dtype=tl.float32, is_pure=True, pack=1
        )
    else:
        return 1.0 / x


@triton.jit
def exp_neg_abs(x, FAST: tl.constexpr):
    """exp(-|x|), with the rounding of x * log2(e) put right: its error would grow with |x|."""
    x = tl.minimum(tl.abs(x), 150.0, propagate_nan=NAN_STAYS)
    t = x * -LOG2E
    rest = tl.fma(x, -LOG2E, -t)
    rest = tl.fma(x, -LOG2E_REST, rest)
    e = exp2(t, FAST)
    return tl.fma(e, rest * LN2, e)


@triton.jit
def softplus(x, FAST: tl.constexpr):
    """log(1 + exp(x)) to 3e-7 of its value for every x, tiny results included.

    With e = exp(-|x|) it is max(x, 0) + log1p(e), and log1p(e) / e is a polynomial on [0, 1]. A logarithm of 1 + e
    would lose what matters of a small e.
    """
    e = exp_neg_abs(x, FAST)
    p = tl.fma(e, 0.005232623778283596, -0.029504956677556038)
    p = tl.fma(p, e, 0.07822549343109131)
    p = tl.fma(p, e, -0.1366320699453354)
    p = tl.fma(p, e, 0.1910598874092102)
    p = tl.fma(p, e, -0.2484297752380371)
    p = tl.fma(p, e, 0.3331909477710724)
    p = tl.fma(p, e, -0.4999949336051941)
    p = tl.fma(p, e, 0.9999999403953552)
    return tl.fma(p, e, tl.maximum(x, 0.0, propagate_nan=NAN_STAYS))


@triton.jit
def sigmoid(x, FAST: tl.constexpr):
    """1 / (1 + exp(-x)) in float32."""
    return reciprocal(1.0 + exp2(x * -LOG2E, FAST), FAST)


@triton.jit
def zero_rows(N: tl.constexpr, BD: tl.constexpr):
    """N vectors of BD zeros as a tuple."""
    rows = ()
    for _ in tl.static_range(N):
        rows = rows + (tl.zeros([BD], tl.float32),)
    return rows


@triton.jit
def scalar_row(p, N: tl.constexpr, PACK: tl.constexpr):
    """N neighbouring values at a scalar pointer as a tuple of float32 scalars, PACK values by one load.

    The address must be a multiple of PACK times the size of a value. Scalars keep the compiler from spreading a
    row over the lanes, which would cost shuffles in every step.
    """
    dtype: tl.constexpr = p.dtype.element_ty
    row = ()
    if PACK == 1:
        for i in tl.static_range(N):
            row = row + (tl.load(p + i).to(tl.float32),)
    else:
        bits: tl.constexpr = dtype.primitive_bitwidth
        word: tl.constexpr = tl.int64 if PACK * bits == 64 else tl.int32
        p_word = p.to(tl.pointer_type(word))
        for i in tl.static_range(N // PACK):
            packed = tl.load(p_word + i)
            for half in tl.static_range(PACK * bits // 32):
                x = (packed >> (32 * half)).to(tl.int32)
                if bits == 32:
                    row = row + (x.to(tl.float32, bitcast=True),)
                elif dtype == tl.bfloat16:  # the upper half of a float32
                    row = row + ((x << 16).to(tl.float32, bitcast=True), (x & -65536).to(tl.float32, bitcast=True))
                else:
                    low = x.to(tl.int16).to(dtype, bitcast=True)
                    row = row + (low.to(tl.float32), (x >> 16).to(tl.int16).to(dtype, bitcast=True).to(tl.float32))
    return row


@triton.jit
def split_columns(tile, N: tl.constexpr, W: tl.constexpr):
    """The first N of the W columns of a tile [BD, W] as a tuple of vectors."""
    if W == 1:
        return (tl.reshape(tile, [tile.shape[0]]),)
    else:
        even, odd = tl.split(tl.reshape(tile, [tile.shape[0], W // 2, 2]))
        evens = split_columns(even, (N + 1) // 2, W // 2)
        odds = split_columns(odd, (N + 1) // 2, W // 2)
        columns = ()
        for n in tl.static_range(N):
            if n % 2 == 0:
                columns = columns + (evens[n // 2],)
            else:
                columns = columns + (odds[n // 2],)
        return columns


@triton.jit
def join_columns(columns, i: tl.constexpr, STEP: tl.constexpr, N: tl.constexpr, W: tl.constexpr):
    """A tile [BD, W] of every STEP-th column from i on; past the N-th the last one is repeated."""
    if W == 1:
        x = columns[i if i < N else N - 1]
        return tl.reshape(x, [x.shape[0], 1])
    else:
        even = join_columns(columns, i, 2 * STEP, N, W // 2)
        odd = join_columns(columns, i + STEP, 2 * STEP, N, W // 2)
        return tl.reshape(tl.join(even, odd), [even.shape[0], W])


def widest_pack(n: int, x: Tensor, strides: tuple[int, ...]) -> int:
    """How many values of a row of n :func:`scalar_row` may take by one load, given the tensor's address and strides."""
    size = x.element_size()
    for pack in (8 // size, 4 // size):
        if pack > 1 and n % pack == 0 and all(s % pack == 0 for s in strides) and x.data_ptr() % (pack * size) == 0:
            return pack
    return 1
