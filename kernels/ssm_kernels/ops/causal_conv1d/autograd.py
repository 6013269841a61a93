"""The convolutions as PyTorch operators with a gradient, for every backend that computes forward and backward."""

# K directions (1 or 2), B batch, L tokens, D channels, W width

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

from ...operators import define, fake_gradients, gradients_of_given, refuse_second_derivative

_ARGUMENTS = 'Tensor x, Tensor weight, Tensor? bias, str padding, bool silu'


def define_convolution(
    backend: str, forward: Callable, backward: Callable, **where: str
) -> tuple[torch._ops.OpOverload, torch._ops.OpOverload, Callable[..., Tensor]]:
    """Defines ``causal_conv1d_<backend>`` and ``causal_conv1d_<backend>_backward``.

    Args:
        backend: its name.
        forward: takes the arguments of :func:`causal_conv1d_reference`; returns y (K, B, L, D).
        backward: takes the gradient of y and the same arguments; returns gradients of x, weight and bias, the last one
            of size 0 if there is no bias.
        where: ``dispatch_key`` of :func:`define`.

    Returns:
        Both operators, and the function to call, which has the signature of :func:`causal_conv1d_reference`.
    """

    def forward_fake(x, weight, bias, padding, silu):
        return x.new_empty(weight.shape[0], *x.shape)

    def backward_fake(dy, x, weight, bias, padding, silu):
        return fake_gradients(x, weight, bias)

    name = f'causal_conv1d_{backend}'
    forward_op = define(name, forward, forward_fake, f'({_ARGUMENTS}) -> Tensor', **where)
    backward_op = define(
        f'{name}_backward',
        backward,
        backward_fake,
        f'(Tensor dy, {_ARGUMENTS}) -> (Tensor, Tensor, Tensor)',
        **where,
    )

    def setup_context(ctx, inputs, output):
        *tensors, ctx.padding, ctx.silu = inputs
        ctx.save_for_backward(*tensors)

    def autograd(ctx, dy):
        tensors = ctx.saved_tensors
        grads = backward_op(dy, *tensors, ctx.padding, ctx.silu)
        return (*gradients_of_given(tensors, grads), None, None)

    torch.library.register_autograd(forward_op, autograd, setup_context=setup_context)
    refuse_second_derivative(backward_op)

    def convolve(x: Tensor, weight: Tensor, bias: Tensor | None, padding: str, silu: bool) -> Tensor:
        """As :func:`causal_conv1d_reference`."""
        return forward_op(x, weight, bias, padding, silu)

    return forward_op, backward_op, convolve
