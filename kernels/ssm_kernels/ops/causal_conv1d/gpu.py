"""The depthwise convolution on a GPU: host side of the Triton kernels, as PyTorch operators with gradients."""

# K directions (1 or 2), B batch, L tokens, D channels, W width

from __future__ import annotations

import torch
from torch import Tensor

from ...triton_utils import dense_rows, empty, fast_math, on_device
from .autograd import define_convolution
from .gpu_kernels import Shape, conv_backward_kernel, conv_forward_kernel

UNROLL = 4  # tokens a turn
MIN_CHUNK = 16
TARGET_PROGRAMS = 8448  # 4 times the 16 warps on each of the 132 multiprocessors of an H100: a short last wave


def plan_chunk(length: int, tiles: int) -> int:
    """Tokens per program, when one program per sequence and tile of channels would make so many programs.

    A formula, not a search, so that two runs add up gradients alike.
    """
    n_chunks = -(-TARGET_PROGRAMS // tiles)
    chunk = max(MIN_CHUNK, -(-length // n_chunks))
    return -(-chunk // UNROLL) * UNROLL


def _shape(x: Tensor, weight: Tensor, bias: Tensor | None, padding: str, silu: bool) -> Shape:
    K, D, W = weight.shape
    left = {'causal': W - 1, 'anticausal': 0, 'both': W - 1, 'same': (W - 1) // 2}[padding]
    return Shape(
        K=K,
        D=D,
        W=W,
        H=2 * W - 1 if padding == 'both' else W,
        LEFT=left,
        BACKWARDS=padding == 'anticausal',
        BD=32 if 0 < D % 64 <= 32 and not torch.version.hip else 64,
        S_X=x.stride(1),
        HAS_BIAS=bias is not None,
        SILU=silu,
        FAST=fast_math(x),
    )


def _grid(x: Tensor, shape: Shape) -> tuple[int, int, int]:
    """Tokens per chunk, chunks per sequence, programs."""
    batch, length, dim = x.shape
    tiles = batch * -(-dim // shape.BD)
    chunk = plan_chunk(length, tiles)
    n_chunks = -(-length // chunk)
    return chunk, n_chunks, tiles * n_chunks


def _bias_strides(bias: Tensor | None) -> tuple[int, int]:
    return (0, 0) if bias is None else (bias.stride(0), bias.stride(1))


def _forward(x: Tensor, weight: Tensor, bias: Tensor | None, padding: str, silu: bool) -> Tensor:
    x = dense_rows(x)
    shape = _shape(x, weight, bias, padding, silu)
    chunk, n_chunks, programs = _grid(x, shape)
    y = empty((shape.K, *x.shape), x.dtype, x)
    with on_device(x):
        conv_forward_kernel[(programs,)](
            x, weight, bias, y, x.shape[0], x.shape[1], chunk, n_chunks, x.stride(0), weight.stride(),
            _bias_strides(bias), shape, UNROLL, num_warps=1, enable_fp_fusion=True,
        )  # fmt: skip
    return y


def _backward(
    dy: Tensor, x: Tensor, weight: Tensor, bias: Tensor | None, padding: str, silu: bool
) -> tuple[Tensor, Tensor, Tensor]:
    x, dy = dense_rows(x), dense_rows(dy)
    shape = _shape(x, weight, bias, padding, silu)
    chunk, n_chunks, programs = _grid(x, shape)
    dx = empty(tuple(x.shape), x.dtype, x)
    parts = empty((shape.K, x.shape[0] * n_chunks, shape.W + shape.HAS_BIAS, shape.D), torch.float32, x)
    with on_device(x):
        conv_backward_kernel[(programs,)](
            x, weight, bias, dy, dx, parts, x.shape[0], x.shape[1], chunk, n_chunks, x.stride(0), weight.stride(),
            _bias_strides(bias), dy.stride()[:2], dy.stride(2), shape, UNROLL, num_warps=1, enable_fp_fusion=True,
        )  # fmt: skip
    sums = parts.sum(1)
    dweight = sums[:, : shape.W].transpose(1, 2).to(weight.dtype, memory_format=torch.contiguous_format, copy=True)
    dbias = x.new_empty(0) if bias is None else sums[:, shape.W].to(bias.dtype, copy=True)
    return dx, dweight, dbias


forward_op, backward_op, causal_conv1d_triton = define_convolution('triton', _forward, _backward)
