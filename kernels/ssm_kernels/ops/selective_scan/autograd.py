"""The selective scan as PyTorch operators with a gradient, for every backend that computes forward and backward."""

# K directions (1 or 2), B batch, L tokens, D channels, N state size, G groups of channels

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

from ...operators import define, fake_gradients, gradients_of_given, refuse_second_derivative

_TENSORS = 'Tensor u, Tensor dt, Tensor A, Tensor B, Tensor C, Tensor? D, Tensor? z, Tensor? dt_bias'
_OPTIONS = 'bool dt_softplus, bool reverse, float scale'


def define_scan(
    backend: str, forward: Callable, backward: Callable, block: int, **where: str
) -> tuple[torch._ops.OpOverload, torch._ops.OpOverload, Callable[..., tuple[Tensor, Tensor]]]:
    """Defines ``selective_scan_<backend>`` and ``selective_scan_<backend>_backward``.

    Args:
        backend: its name.
        forward: takes the arguments of :func:`selective_scan_reference` and whether to keep states for the backward
            pass; returns y (B, L, D), the last states (K, B, D, N) and the kept ones, flat, of size 0 if none are.
        backward: takes the gradients of y and of the last states, either of which may be None, the tensors, the kept
            states and the options; returns a gradient for every tensor, of size 0 where there is no tensor.
        block: tokens from one kept state to the next.
        where: ``dispatch_key`` of :func:`define`.

    Returns:
        Both operators, and the function to call, which has the signature of :func:`selective_scan_reference`.
    """

    def forward_fake(u, dt, A, B, C, D, z, dt_bias, dt_softplus, reverse, scale, save_states):
        K, batch, length, dim = u.shape
        # of one dimension: an export with free lengths would settle whether there is one block
        states = K * batch * ((length + block - 1) // block) * dim * A.shape[-1] if save_states else 0
        return (
            u.new_empty(batch, length, dim),
            u.new_empty(K, batch, dim, A.shape[-1], dtype=torch.float32),
            u.new_empty(states, dtype=torch.float32),
        )

    def backward_fake(dy, dlast, u, dt, A, B, C, D, z, dt_bias, states, dt_softplus, reverse, scale):
        return fake_gradients(u, dt, A, B, C, D, z, dt_bias)

    name = f'selective_scan_{backend}'
    results, gradients = (f'({", ".join(["Tensor"] * n)})' for n in (3, 8))
    forward_op = define(
        name, forward, forward_fake, f'({_TENSORS}, {_OPTIONS}, bool save_states) -> {results}', **where
    )
    backward_op = define(
        f'{name}_backward',
        backward,
        backward_fake,
        f'(Tensor? dy, Tensor? dlast, {_TENSORS}, Tensor states, {_OPTIONS}) -> {gradients}',
        **where,
    )

    def setup_context(ctx, inputs, output):
        *tensors, dt_softplus, reverse, scale, save_states = inputs
        ctx.set_materialize_grads(False)
        ctx.options = dt_softplus, reverse, scale
        ctx.saved = save_states
        ctx.save_for_backward(*tensors, output[2])

    def autograd(ctx, dy, dlast, dstates):
        if not ctx.saved:
            raise RuntimeError(f'{name}: backward needs save_states=True in the forward call')
        *tensors, states = ctx.saved_tensors
        grads = backward_op(dy, dlast, *tensors, states, *ctx.options)
        return (*gradients_of_given(tensors, grads), None, None, None, None)

    torch.library.register_autograd(forward_op, autograd, setup_context=setup_context)
    refuse_second_derivative(backward_op)

    def scan(
        u: Tensor,
        dt: Tensor,
        A: Tensor,
        B: Tensor,
        C: Tensor,
        D: Tensor | None = None,
        z: Tensor | None = None,
        dt_bias: Tensor | None = None,
        dt_softplus: bool = False,
        reverse: bool = False,
        scale: float = 1.0,
    ) -> tuple[Tensor, Tensor]:
        """As :func:`selective_scan_reference`; states are kept if a gradient may be asked for."""
        tensors = (u, dt, A, B, C, D, z, dt_bias)
        save_states = torch.is_grad_enabled() and any(x is not None and x.requires_grad for x in tensors)
        return forward_op(*tensors, dt_softplus, reverse, scale, save_states)[:2]

    return forward_op, backward_op, scan
