"""Defines PyTorch operators with as little as possible between a call and the function that runs."""

from __future__ import annotations

from collections.abc import Callable, Iterable

import torch
from torch import Tensor

_library = torch.library.Library('ssm_kernels', 'FRAGMENT')


def define(
    name: str, function: Callable, fake: Callable, schema: str, dispatch_key: str = 'CompositeExplicitAutograd'
) -> torch._ops.OpOverload:
    """The operator ``ssm_kernels::name``.

    ``torch.library.custom_op`` does the same, but wraps the function in checks that cost 8 us a call at inference and
    18 us where gradients are merely switched off, more than some of our kernels take on a small image.

    Args:
        name: of the operator, without the namespace.
        function: runs it; its results must be new tensors.
        fake: makes empty results of the same shapes and dtypes, for tracing.
        schema: arguments and results as PyTorch writes them.
        dispatch_key: where the function runs: 'CPU', or any device.

    Returns:
        The operator, to be called like the function.
    """
    _library.define(name + schema)
    _library.impl(name, function, dispatch_key)
    op = getattr(torch.ops.ssm_kernels, name).default
    torch.library.register_fake(op, fake, lib=_library)
    return op


def refuse_second_derivative(backward: torch._ops.OpOverload) -> None:
    """Makes the gradient of an operator ``room_backend_backward`` a RuntimeError that says so."""
    room, backend, _ = backward._schema.name.removeprefix('ssm_kernels::').rsplit('_', 2)

    def refuse(ctx, *grads):
        raise RuntimeError(f"{room}: backend '{backend}' has no second derivative; take backend='torch'")

    torch.library.register_autograd(backward, refuse, lib=_library)


def fake_gradients(first: Tensor, *others: Tensor | None) -> tuple[Tensor, ...]:
    """What a backward operator returns for these tensors, unfilled: of size 0 where there is none."""
    return tuple(first.new_empty(0) if x is None else x.new_empty(x.shape) for x in (first, *others))


def gradients_of_given(tensors: Iterable[Tensor | None], gradients: Iterable[Tensor]) -> tuple[Tensor | None, ...]:
    """The gradients of a backward operator as autograd takes them: None where there is no tensor."""
    return tuple(None if x is None else g for x, g in zip(tensors, gradients, strict=True))
