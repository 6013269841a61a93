"""All that stands between the two projections of a Mamba mixer: convolution, (dt, B, C), selective scan, gate.

Source: Mamba, arXiv 2312.00752, figure 3 and algorithm 2; both directions: Vision Mamba, arXiv 2401.09417, algorithm 1.
"""

# K directions (1 or 2), B batch, L tokens, D channels, N state size, R rank of dt, W width

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch
from torch import Tensor

from ...arguments import (
    activation_dtypes,
    autocast_dtype,
    check_beside,
    check_choice,
    check_flag,
    check_number,
    check_same_shape,
    check_shape,
    check_tensor,
    fail,
    parameter_dtypes,
    shape_of,
)
from ...dispatch import Backend, choose_backend, numba_why_not
from ..causal_conv1d import MAX_WIDTH, MIN_WIDTH
from ..selective_scan import scan_triton_why_not
from .composed import mamba_inner_composed
from .weights import DirectionWeights

OPTIONAL = ('conv_bias', 'D', 'dt_bias')
_NAMES = tuple(
    tuple((f'weights[{k}].{field}', field in OPTIONAL) for field in DirectionWeights._fields) for k in range(2)
)


def _load_numba() -> Callable:
    from .cpu import mamba_inner_numba

    return mamba_inner_numba


BACKENDS = (
    Backend('triton', scan_triton_why_not, lambda: mamba_inner_composed),
    Backend('numba', numba_why_not, _load_numba),
    Backend('torch', lambda x, n: None, lambda: mamba_inner_composed),
)


def mamba_inner(
    x: Tensor,
    z: Tensor | None,
    weights: Sequence[DirectionWeights],
    *,
    scale: float = 1.0,
    reverse: bool = False,
    padding: str = 'causal',
    backend: str | None = None,
) -> Tensor:
    """``u = silu(conv(x))``, ``(dt, B, C) = x_proj u``, scan with ``softplus(dt_proj dt + dt_bias)``, gate with z.

    With two directions the second convolves, and scans, from the last token to the first; the results are added before
    the gate. Where no gradient is needed one fused kernel runs, on the devices that have one; otherwise this is
    composed of the convolutions and scans of this package, with the same result up to rounding.

    Source: Mamba, arXiv 2312.00752, figure 3 and algorithm 2; both directions: Vision Mamba, arXiv 2401.09417,
    algorithm 1.

    Args:
        x: (B, L, D), float32, float16, bfloat16 or float64; the result has this dtype. Strides of B and L are free.
            Under autocast float32 tensors are taken in the autocast dtype; weights of convolution and scan keep theirs.
        z: gate (B, L, D), dtype of x; None for no gate.
        weights: parameters of one or two directions, float32 or dtype of x.
        scale: factor of the result, 0.5 for the mean of two directions.
        reverse: with one direction, convolve and scan from the last token to the first.
        padding: 'causal', or 'same' (PyTorch's; one direction only).
        backend: 'triton', 'numba' or 'torch'; None takes the first that can run these tensors.

    Returns:
        (B, L, D) in x's dtype, or autocast's.

    Raises:
        ValueError: if a shape, dtype, device or option does not fit, naming the argument; or for an unknown backend.
        RuntimeError: if the forced backend cannot run these tensors, with its reason.
    """
    op = 'mamba_inner'
    weights = _directions(op, weights)
    _check(op, x, z, weights, scale, reverse, padding)
    low = autocast_dtype(x)
    if low is not None:
        x, z = x.to(low), None if z is None else z.to(low)
    run = choose_backend(op, BACKENDS, backend, x, weights[0].A.shape[1])
    if run.name == 'numba' and not _needs_grad(x, z, weights):
        return run.load()(x, z, weights, scale, reverse, padding)
    return mamba_inner_composed(x, z, weights, scale, reverse, padding, backend)


def _needs_grad(x: Tensor, z: Tensor | None, weights: list[DirectionWeights]) -> bool:
    if not torch.is_grad_enabled():
        return False
    return any(t is not None and t.requires_grad for t in (x, z, *(t for w in weights for t in w)))


def _directions(op: str, weights: Sequence[DirectionWeights]) -> list[DirectionWeights]:
    """Raises ValueError unless weights is a list or tuple of DirectionWeights, or of tuples like them."""
    if not isinstance(weights, (list, tuple)) or isinstance(weights, DirectionWeights):
        fail(op, 'weights', f'must be a list of DirectionWeights, got {type(weights).__name__}')
    for k, w in enumerate(weights):
        if not isinstance(w, (list, tuple)) or len(w) != len(DirectionWeights._fields):
            fail(op, f'weights[{k}]', f'must be DirectionWeights or {len(DirectionWeights._fields)} values like them')
    return [DirectionWeights(*w) for w in weights]


def _check(
    op: str,
    x: Tensor,
    z: Tensor | None,
    weights: list[DirectionWeights],
    scale: float,
    reverse: bool,
    padding: str,
) -> None:
    """Raises ValueError at the first argument that does not fit, with both shapes and what is legal."""
    check_number(op, 'scale', scale)
    check_flag(op, 'reverse', reverse)
    check_choice(op, 'padding', padding, ('causal', 'same'))
    check_tensor(op, 'x', x)
    if x.dim() != 3:
        fail(op, 'x', f'has shape {shape_of(x)}, must be (B, L, D)')
    check_beside(op, 'z', z, x, activation_dtypes(x), optional=True)
    check_same_shape(op, 'z', z, x)
    if len(weights) not in (1, 2):
        fail(op, 'weights', f'has {len(weights)} directions, must have 1 or 2')
    if len(weights) == 2 and (reverse or padding == 'same'):
        fail(op, 'reverse' if reverse else 'padding', 'is for one direction, weights has 2')
    if reverse and padding == 'same':
        fail(op, 'reverse', "is for padding='causal'")
    legal = parameter_dtypes(x)
    wanted: tuple[tuple[int, ...], ...] = ()
    for names, w in zip(_NAMES, weights, strict=False):
        for (name, optional), tensor in zip(names, w, strict=True):
            check_beside(op, name, tensor, x, legal, optional=optional)
        wanted = wanted or _shapes(op, w, x.shape[2])
        for (name, _), tensor, sizes in zip(names, w, wanted, strict=True):
            check_shape(op, name, tensor, sizes, x)


def _shapes(op: str, first: DirectionWeights, dim: int) -> tuple[tuple[int, ...], ...]:
    """What the weights of every direction must be, by the sizes that are free in those of the first one."""
    width, rank, n = (w.shape[1] if w.dim() == 2 else 0 for w in (first.conv_weight, first.dt_proj, first.A))
    if not MIN_WIDTH <= width <= MAX_WIDTH:
        shape = shape_of(first.conv_weight)
        fail(op, _NAMES[0][0][0], f'has shape {shape}, must be ({dim}, W) with W from {MIN_WIDTH} to {MAX_WIDTH}')
    return (dim, width), (dim,), (rank + 2 * n, dim), (dim, rank), (dim, n), (dim,), (dim,)
