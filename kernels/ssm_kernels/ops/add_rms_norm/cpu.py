"""Residual addition and RMSNorm on a CPU: host side of the Numba kernel and the PyTorch custom operators."""

# T tokens, D channels

from __future__ import annotations

import torch
from torch import Tensor

from ...cpu_threads import address, empty, rows, whole
from ...operators import define, refuse_second_derivative
from . import cpu_kernel

SPARE = 256  # bytes of scratch that a forward task needs


def _tasks(x: Tensor) -> int:
    return -(-x.shape[0] // cpu_kernel.BLOCK)


def _forward(
    x: Tensor, residual: Tensor | None, weight: Tensor, eps: float, out_dtype: torch.dtype
) -> tuple[Tensor, Tensor, Tensor]:
    x, residual, weight = rows(x), rows(residual), whole(weight)
    out, stream, rstd = empty(*x.shape), empty(*x.shape), empty(x.shape[0])
    fields: dict[str, float] = {
        'T': x.shape[0], 'D': x.shape[1], 'x': x.data_ptr(), 'x_l': 4 * x.stride(0), 'residual': address(residual),
        'residual_l': 0 if residual is None else 4 * residual.stride(0), 'weight': weight.data_ptr(),
        'stream': stream.data_ptr(), 'out': out.data_ptr(), 'rstd': rstd.data_ptr(), 'scale': eps,
    }  # fmt: skip
    cpu_kernel.forward(SPARE, _tasks(x), fields)
    return out if out_dtype == torch.float32 else out.to(out_dtype), stream, rstd


def _backward(
    dout: Tensor | None, dstream: Tensor | None, stream: Tensor, weight: Tensor, rstd: Tensor
) -> tuple[Tensor, Tensor]:
    if dout is None:
        assert dstream is not None  # autograd asks for nothing where neither has a gradient
        return dstream.clone(), torch.zeros_like(weight)
    dtype = weight.dtype
    dout, dstream, weight = whole(dout), whole(dstream), whole(weight)
    dx, dweight = empty(*stream.shape), empty(_tasks(stream), stream.shape[1])
    fields: dict[str, float] = {
        'T': stream.shape[0], 'D': stream.shape[1], 'stream': stream.data_ptr(), 'weight': weight.data_ptr(),
        'rstd': rstd.data_ptr(), 'dout': dout.data_ptr(), 'dstream': address(dstream), 'dx': dx.data_ptr(),
        'dweight': dweight.data_ptr(),
    }  # fmt: skip
    cpu_kernel.backward(cpu_kernel.backward_scratch_bytes(stream.shape[1]), _tasks(stream), fields)
    return dx, dweight.sum(0).to(dtype)


def _forward_fake(x, residual, weight, eps, out_dtype):
    return (
        x.new_empty(x.shape, dtype=out_dtype),
        x.new_empty(x.shape, dtype=torch.float32),
        x.new_empty(x.shape[0], dtype=torch.float32),
    )


def _backward_fake(dout, dstream, stream, weight, rstd):
    return stream.new_empty(stream.shape), weight.new_empty(weight.shape)


forward_op = define(
    'add_rms_norm_numba',
    _forward,
    _forward_fake,
    '(Tensor x, Tensor? residual, Tensor weight, float eps, ScalarType out_dtype) -> (Tensor, Tensor, Tensor)',
    'CPU',
)
backward_op = define(
    'add_rms_norm_numba_backward',
    _backward,
    _backward_fake,
    '(Tensor? dout, Tensor? dstream, Tensor stream, Tensor weight, Tensor rstd) -> (Tensor, Tensor)',
    'CPU',
)


def _setup_context(ctx, inputs, output):
    x, residual, weight, _, _ = inputs
    _, stream, rstd = output
    ctx.set_materialize_grads(False)
    ctx.mark_non_differentiable(rstd)
    ctx.x_dtype, ctx.started = x.dtype, residual is not None
    ctx.save_for_backward(stream, weight, rstd)


def _autograd(ctx, dout, dstream, drstd):
    if dout is None and dstream is None:
        return None, None, None, None, None
    dx, dweight = backward_op(dout, dstream, *ctx.saved_tensors)
    return dx.to(ctx.x_dtype), dx if ctx.started else None, dweight, None, None


torch.library.register_autograd(forward_op, _autograd, setup_context=_setup_context)
refuse_second_derivative(backward_op)


def add_rms_norm_numba(
    x: Tensor, residual: Tensor | None, weight: Tensor, eps: float, out_dtype: torch.dtype
) -> tuple[Tensor, Tensor]:
    """As :func:`add_rms_norm_reference`."""
    return forward_op(x, residual, weight, eps, out_dtype)[:2]
