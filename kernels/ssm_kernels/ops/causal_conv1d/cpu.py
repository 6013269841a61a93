"""The depthwise convolution on a CPU: host side of the Numba kernel and the PyTorch custom operators."""

# K directions (1 or 2), B batch, L tokens, D channels, W width

from __future__ import annotations

from torch import Tensor

from ...cpu_threads import address, empty, rows, whole
from . import cpu_kernel
from .autograd import define_convolution


def _fields(x: Tensor, weight: Tensor, bias: Tensor | None, padding: str, silu: bool) -> dict[str, float]:
    batch, length, dim = x.shape
    return {
        'K': weight.shape[0], 'B': batch, 'L': length, 'D': dim, 'W': weight.shape[2], 'silu': silu,
        'reverse': padding == 'anticausal', 'same': padding == 'same', 'x': x.data_ptr(), 'x_b': 4 * x.stride(0),
        'x_l': 4 * x.stride(1), 'weight': weight.data_ptr(), 'bias': address(bias),
    }  # fmt: skip


def _tasks(x: Tensor) -> int:
    return x.shape[0] * -(-x.shape[1] // cpu_kernel.BLOCK)


def _forward(x: Tensor, weight: Tensor, bias: Tensor | None, padding: str, silu: bool) -> Tensor:
    dtype = x.dtype
    x, weight, bias = rows(x), whole(weight), whole(bias)
    y = empty(weight.shape[0], *x.shape)
    fields = _fields(x, weight, bias, padding, silu) | {'y': y.data_ptr()}
    cpu_kernel.forward(cpu_kernel.scratch_bytes(), _tasks(x), fields)
    return y.to(dtype)


def _backward(
    dy: Tensor, x: Tensor, weight: Tensor, bias: Tensor | None, padding: str, silu: bool
) -> tuple[Tensor, Tensor, Tensor]:
    dtype, dtype_w, dtype_b = x.dtype, weight.dtype, None if bias is None else bias.dtype
    dy, x, weight, bias = whole(dy), rows(x), whole(weight), whole(bias)
    dx = empty(*x.shape)
    dweight, dbias = empty(_tasks(x), *weight.shape), empty(_tasks(x), *weight.shape[:2])
    fields = _fields(x, weight, bias, padding, silu) | {
        'dy': dy.data_ptr(), 'dx': dx.data_ptr(), 'dweight': dweight.data_ptr(), 'dbias': dbias.data_ptr()
    }  # fmt: skip
    cpu_kernel.backward(cpu_kernel.scratch_bytes(), _tasks(x), fields)
    dbias = x.new_empty(0) if bias is None else dbias.sum(0).to(dtype_b)
    return dx.to(dtype), dweight.sum(0).to(dtype_w), dbias


forward_op, backward_op, causal_conv1d_numba = define_convolution('numba', _forward, _backward, dispatch_key='CPU')
