"""Short depthwise convolutions along the tokens: public functions, argument checks and the table of backends.

Source: Mamba, arXiv 2312.00752, section 3.4 (causal); the other paddings are those of vision models built on it.
"""

# K directions (1 or 2), B batch, L tokens, D channels, W width

from __future__ import annotations

from collections.abc import Callable

from torch import Tensor

from ...arguments import (
    autocast_dtype,
    check_beside,
    check_choice,
    check_flag,
    check_shape,
    check_tensor,
    fail,
    parameter_dtypes,
    shape_of,
)
from ...dispatch import Backend, choose_backend, numba_why_not, triton_why_not
from .reference import causal_conv1d_reference

MIN_WIDTH, MAX_WIDTH = 2, 4


def _load_triton() -> Callable:
    from .gpu import causal_conv1d_triton

    return causal_conv1d_triton


def _load_numba() -> Callable:
    from .cpu import causal_conv1d_numba

    return causal_conv1d_numba


BACKENDS = (
    Backend('triton', triton_why_not, _load_triton),
    Backend('numba', numba_why_not, _load_numba),
    Backend('torch', lambda x, width: None, lambda: causal_conv1d_reference),
)


def causal_conv1d(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None = None,
    *,
    activation: str | None = 'silu',
    reverse: bool = False,
    backend: str | None = None,
) -> Tensor:
    """``y[l] = act(bias + sum_j weight[j] x[l - (W-1) + j])`` in every channel, tokens before the first being zero.

    Source: Mamba, arXiv 2312.00752, section 3.4.

    Args:
        x: input (B, L, D), float32, float16, bfloat16 or float64; the result has this dtype. Under autocast it is
            taken in the autocast dtype; the parameters keep theirs. Sums are float32 (float64 for float64).
        weight: (D, W), W from 2 to 4, float32 or dtype of x.
        bias: (D), float32 or dtype of x; None for no bias.
        activation: 'silu' or None.
        reverse: read the following tokens instead, ``y[l] = act(bias + sum_j weight[j] x[l + (W-1) - j])``. This is
            the flip of the convolution of the flipped tokens, with nothing flipped.
        backend: 'triton', 'numba' or 'torch'; None takes the first that can run these tensors.

    Returns:
        (B, L, D) in x's dtype, or autocast's.

    Raises:
        ValueError: if a shape, dtype, device or option does not fit, naming the argument; or for an unknown backend.
        RuntimeError: if the forced backend cannot run these tensors, with its reason.
    """
    op = 'causal_conv1d'
    _check(op, (), x, weight, bias, activation)
    check_flag(op, 'reverse', reverse)
    weight, bias = _with_direction(weight, bias)
    return _run(op, backend, x, weight, bias, 'anticausal' if reverse else 'causal', activation).squeeze(0)


def bidirectional_causal_conv1d(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None = None,
    *,
    activation: str | None = 'silu',
    backend: str | None = None,
) -> Tensor:
    """A causal convolution and an anti-causal one of the same tokens, from one read of them.

    Source: Vision Mamba, arXiv 2401.09417, algorithm 1.

    Args:
        x: input (B, L, D), as in :func:`causal_conv1d`.
        weight: (2, D, W); index 0 belongs to the causal convolution, index 1 to the anti-causal one.
        bias: (2, D) or None.
        activation: 'silu' or None.
        backend: as in :func:`causal_conv1d`.

    Returns:
        (2, B, L, D): index 0 causal, index 1 anti-causal (``reverse=True`` of :func:`causal_conv1d`).

    Raises:
        ValueError: as :func:`causal_conv1d`.
        RuntimeError: as :func:`causal_conv1d`.
    """
    op = 'bidirectional_causal_conv1d'
    _check(op, (2,), x, weight, bias, activation)
    return _run(op, backend, x, weight, bias, 'both', activation)


def same_conv1d(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None = None,
    *,
    activation: str | None = 'silu',
    backend: str | None = None,
) -> Tensor:
    """``y[l] = act(bias + sum_j weight[j] x[l - (W-1)//2 + j])``: PyTorch's ``padding='same'``.

    Source: MambaVision, arXiv 2407.08083, whose mixer sees tokens on both sides.

    Args:
        x: input (B, L, D), as in :func:`causal_conv1d`.
        weight: (D, W).
        bias: (D) or None.
        activation: 'silu' or None.
        backend: as in :func:`causal_conv1d`.

    Returns:
        (B, L, D) in x's dtype, or autocast's.

    Raises:
        ValueError: as :func:`causal_conv1d`.
        RuntimeError: as :func:`causal_conv1d`.
    """
    op = 'same_conv1d'
    _check(op, (), x, weight, bias, activation)
    weight, bias = _with_direction(weight, bias)
    return _run(op, backend, x, weight, bias, 'same', activation).squeeze(0)


def causal_conv1d_fn(x: Tensor, weight: Tensor, bias: Tensor | None = None, activation: str | None = None) -> Tensor:
    """:func:`causal_conv1d` with the channels-first layout of the causal_conv1d package's function of this name.

    Args:
        x: (B, D, L).
        weight: (D, W), W from 2 to 4.
        bias: (D) or None.
        activation: 'silu', its other name 'swish', or None.

    Returns:
        (B, D, L) in x's dtype.

    Raises:
        ValueError: if a shape, dtype, device or option does not fit, naming the argument.
    """
    op = 'causal_conv1d_fn'
    _check(op, (), x, weight, bias, activation, ('silu', 'swish', None), channels_first=True)
    weight, bias = _with_direction(weight, bias)
    activation = 'silu' if activation == 'swish' else activation
    return _run(op, None, x.transpose(1, 2), weight, bias, 'causal', activation).squeeze(0).transpose(1, 2).contiguous()


def _with_direction(weight: Tensor, bias: Tensor | None) -> tuple[Tensor, Tensor | None]:
    return weight.unsqueeze(0), None if bias is None else bias.unsqueeze(0)


def _run(
    op: str, forced: str | None, x: Tensor, weight: Tensor, bias: Tensor | None, padding: str, activation: str | None
) -> Tensor:
    low = autocast_dtype(x)
    if low is not None:
        x = x.to(low)
    run = choose_backend(op, BACKENDS, forced, x, weight.shape[-1]).load()
    return run(x, weight, bias, padding, activation == 'silu')


def _check(
    op: str,
    lead: tuple[int, ...],
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    activation: str | None,
    activations: tuple[str | None, ...] = ('silu', None),
    channels_first: bool = False,
) -> None:
    """Raises ValueError at the first argument that does not fit, with both shapes and what is legal."""
    check_choice(op, 'activation', activation, activations)
    check_tensor(op, 'x', x)
    legal = parameter_dtypes(x)
    check_beside(op, 'weight', weight, x, legal)
    check_beside(op, 'bias', bias, x, legal, optional=True)
    if x.dim() != 3:
        fail(op, 'x', f'has shape {shape_of(x)}, must be {"(B, D, L)" if channels_first else "(B, L, D)"}')
    wanted = (*lead, x.shape[1 if channels_first else 2])
    check_shape(op, 'weight', weight, wanted, x, free='W')
    width = weight.shape[-1]
    if not MIN_WIDTH <= width <= MAX_WIDTH:
        fail(op, 'weight', f'has shape {shape_of(weight)}: width {width}, legal are {MIN_WIDTH} to {MAX_WIDTH}')
    check_shape(op, 'bias', bias, wanted, x)
