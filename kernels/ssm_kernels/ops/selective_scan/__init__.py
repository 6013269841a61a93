"""Selective scan (the recurrence of Mamba-1): public functions, argument checks and the table of backends.

Source: Mamba, arXiv 2312.00752, equation 2 and algorithm 2.
"""

# K directions (1 or 2), B batch, L tokens, D channels, N state size, G groups of channels

from __future__ import annotations

from collections.abc import Callable
from typing import Literal, overload

from torch import Tensor

from ...arguments import (
    activation_dtypes,
    autocast_dtype,
    check_beside,
    check_flag,
    check_number,
    check_same_shape,
    check_shape,
    check_tensor,
    fail,
    parameter_dtypes,
    shape_of,
)
from ...dispatch import Backend, choose_backend, numba_why_not, triton_why_not
from .reference import selective_scan_reference

MAX_STATE_SIZE = 256


def scan_triton_why_not(u: Tensor, n: int) -> str | None:
    """Why the Triton scan cannot run tensors like u with n states; None if it can."""
    if n > 64:
        return f'the state size is {n}; the kernel takes up to 64'
    return triton_why_not(u, n)


def _load_triton() -> Callable:
    from .gpu import selective_scan_triton

    return selective_scan_triton


def _load_numba() -> Callable:
    from .cpu import selective_scan_numba

    return selective_scan_numba


BACKENDS = (
    Backend('triton', scan_triton_why_not, _load_triton),
    Backend('numba', numba_why_not, _load_numba),
    Backend('torch', lambda u, n: None, lambda: selective_scan_reference),
)


@overload
def selective_scan(
    u: Tensor, dt: Tensor, A: Tensor, B: Tensor, C: Tensor, D: Tensor | None = ..., z: Tensor | None = ...,
    dt_bias: Tensor | None = ..., *, dt_softplus: bool = ..., reverse: bool = ...,
    return_last_state: Literal[False] = ..., backend: str | None = ...,
) -> Tensor: ...  # fmt: skip
@overload
def selective_scan(
    u: Tensor, dt: Tensor, A: Tensor, B: Tensor, C: Tensor, D: Tensor | None = ..., z: Tensor | None = ...,
    dt_bias: Tensor | None = ..., *, dt_softplus: bool = ..., reverse: bool = ..., return_last_state: Literal[True],
    backend: str | None = ...,
) -> tuple[Tensor, Tensor]: ...  # fmt: skip
def selective_scan(
    u: Tensor,
    dt: Tensor,
    A: Tensor,
    B: Tensor,
    C: Tensor,
    D: Tensor | None = None,
    z: Tensor | None = None,
    dt_bias: Tensor | None = None,
    *,
    dt_softplus: bool = False,
    reverse: bool = False,
    return_last_state: bool = False,
    backend: str | None = None,
) -> Tensor | tuple[Tensor, Tensor]:
    """``h_l = exp(delta_l A) h_{l-1} + delta_l B_l u_l``, ``y_l = <C_l, h_l> + D u_l``, then ``y_l * silu(z_l)``.

    delta is ``dt + dt_bias``, or softplus of that. Source: Mamba, arXiv 2312.00752, equation 2 and algorithm 2.

    Args:
        u: input (B, L, D), float32, float16, bfloat16 or float64; the result has this dtype. Under autocast
            float32 activations are taken in the autocast dtype; the parameters keep theirs.
        dt: step sizes before bias and softplus, (B, L, D), dtype of u.
        A: (D, N), float32 or dtype of u.
        B: (B, L, N) shared by all channels or (B, L, G, N) for G groups of D/G neighbouring channels, dtype of u; or
            (D, N) constant over the tokens, float32 or dtype of u.
        C: as B, but need not be of the same kind.
        D: weights of the skip connection, (D), float32 or dtype of u; None for no skip.
        z: gate (B, L, D), dtype of u; None for no gate.
        dt_bias: (D), float32 or dtype of u.
        dt_softplus: whether delta is softplus(dt + dt_bias).
        reverse: run from the last token to the first. Nothing is flipped: ``y[:, l]`` belongs to ``u[:, l]``.
        return_last_state: also return the state after the last step (with ``reverse`` that is token 0).
        backend: 'triton', 'numba' or 'torch'; None takes the first that can run these tensors.

    Returns:
        y (B, L, D), or (y, last_state) with last_state (B, D, N) in float32 (float64 for float64 input).

    Raises:
        ValueError: if a shape, dtype or device does not fit, naming the argument; or for an unknown backend.
        RuntimeError: if the forced backend cannot run these tensors, with its reason.
    """
    op = 'selective_scan'
    check_flag(op, 'reverse', reverse)
    check_flag(op, 'return_last_state', return_last_state)
    _check(op, (), u, dt, A, B, C, D, z, dt_bias, dt_softplus)
    u, dt, A, B, C = (x.unsqueeze(0) for x in (u, dt, A, B, C))
    D, dt_bias = (None if x is None else x.unsqueeze(0) for x in (D, dt_bias))
    y, state = _run(op, backend, u, dt, A, B, C, D, z, dt_bias, dt_softplus, reverse, 1.0)
    return (y, state.squeeze(0)) if return_last_state else y


def bidirectional_selective_scan(
    u: Tensor,
    dt: Tensor,
    A: Tensor,
    B: Tensor,
    C: Tensor,
    D: Tensor | None = None,
    z: Tensor | None = None,
    dt_bias: Tensor | None = None,
    *,
    dt_softplus: bool = False,
    scale: float = 1.0,
    backend: str | None = None,
) -> Tensor:
    """``scale * (y_0 + y_1) * silu(z)`` of a scan from left to right and one from right to left, nothing flipped.

    Source: Vision Mamba, arXiv 2401.09417, algorithm 1.

    Arguments as in :func:`selective_scan` with one leading dimension of size 2 for the direction: index 0 runs from
    the first token to the last, index 1 from the last to the first. A direction that shares a tensor with the other
    may pass an expanded view.

    Args:
        u: (2, B, L, D).
        dt: (2, B, L, D).
        A: (2, D, N).
        B: (2, B, L, N), (2, B, L, G, N) or (2, D, N).
        C: as B.
        D: (2, D).
        z: gate (B, L, D), shared by both directions.
        dt_bias: (2, D).
        dt_softplus: whether delta is softplus(dt + dt_bias).
        scale: factor of the result, 0.5 for the mean of both directions.
        backend: as in :func:`selective_scan`.

    Returns:
        (B, L, D) in u's dtype, or autocast's.

    Raises:
        ValueError: as :func:`selective_scan`.
        RuntimeError: as :func:`selective_scan`.
    """
    op = 'bidirectional_selective_scan'
    check_number(op, 'scale', scale)
    _check(op, (2,), u, dt, A, B, C, D, z, dt_bias, dt_softplus)
    return _run(op, backend, u, dt, A, B, C, D, z, dt_bias, dt_softplus, False, scale)[0]


@overload
def selective_scan_fn(
    u: Tensor, delta: Tensor, A: Tensor, B: Tensor, C: Tensor, D: Tensor | None = ..., z: Tensor | None = ...,
    delta_bias: Tensor | None = ..., delta_softplus: bool = ..., return_last_state: Literal[False] = ...,
) -> Tensor: ...  # fmt: skip
@overload
def selective_scan_fn(
    u: Tensor, delta: Tensor, A: Tensor, B: Tensor, C: Tensor, D: Tensor | None = ..., z: Tensor | None = ...,
    delta_bias: Tensor | None = ..., delta_softplus: bool = ..., *, return_last_state: Literal[True],
) -> tuple[Tensor, Tensor]: ...  # fmt: skip
def selective_scan_fn(
    u: Tensor,
    delta: Tensor,
    A: Tensor,
    B: Tensor,
    C: Tensor,
    D: Tensor | None = None,
    z: Tensor | None = None,
    delta_bias: Tensor | None = None,
    delta_softplus: bool = False,
    return_last_state: bool = False,
) -> Tensor | tuple[Tensor, Tensor]:
    """:func:`selective_scan` with the signature and the channels-first layout of mamba_ssm's function of this name.

    Args:
        u: (B, D, L).
        delta: (B, D, L).
        A: (D, N), real.
        B: (D, N) constant, (B, N, L) shared or (B, G, N, L) grouped.
        C: as B.
        D: (D).
        z: gate (B, D, L).
        delta_bias: (D).
        delta_softplus: whether the step is softplus(delta + delta_bias).
        return_last_state: also return the state after the last token.

    Returns:
        out (B, D, L) in u's dtype, or (out, last_state) with last_state (B, D, N) in float32
        (float64 for float64 input).

    Raises:
        ValueError: if a shape, dtype or device does not fit, naming the argument.
    """
    op = 'selective_scan_fn'
    check_flag(op, 'return_last_state', return_last_state)
    _check(op, (), u, delta, A, B, C, D, z, delta_bias, delta_softplus, channels_first=True)
    z = None if z is None else z.mT
    B, C = (x if x.dim() == 2 else x.movedim(-1, 1) for x in (B, C))
    y, state = selective_scan(
        u.mT, delta.mT, A, B, C, D, z, delta_bias, dt_softplus=delta_softplus, return_last_state=True
    )
    y = y.mT.contiguous()
    return (y, state) if return_last_state else y


def _run(
    op: str, forced: str | None,
    u: Tensor, dt: Tensor, A: Tensor, B: Tensor, C: Tensor, D: Tensor | None, z: Tensor | None, dt_bias: Tensor | None,
    dt_softplus: bool, reverse: bool, scale: float,
) -> tuple[Tensor, Tensor]:  # fmt: skip
    """Dispatches K stacked directions: one shape of call for every backend."""
    low = autocast_dtype(u)
    if low is not None:
        u, dt = u.to(low), dt.to(low)
        B, C = (x if x.dim() == 3 else x.to(low) for x in (B, C))
        z = None if z is None else z.to(low)
    B, C = (x.unsqueeze(3) if x.dim() == 4 else x for x in (B, C))
    run = choose_backend(op, BACKENDS, forced, u, A.shape[-1]).load()
    return run(u, dt, A, B, C, D, z, dt_bias, dt_softplus, reverse, scale)


def _check(
    op: str, lead: tuple[int, ...],
    u: Tensor, dt: Tensor, A: Tensor, B: Tensor, C: Tensor, D: Tensor | None, z: Tensor | None, dt_bias: Tensor | None,
    dt_softplus: bool, channels_first: bool = False,
) -> None:  # fmt: skip
    """Raises ValueError at the first argument that does not fit, with both shapes and what is legal."""
    dt_name, bias_name = ('delta', 'delta_bias') if channels_first else ('dt', 'dt_bias')
    check_flag(op, f'{dt_name}_softplus', dt_softplus)
    check_tensor(op, 'u', u)
    activations, parameters = activation_dtypes(u), parameter_dtypes(u)
    check_beside(op, dt_name, dt, u, activations, 'u')
    check_beside(op, 'A', A, u, parameters, 'u')
    for name, x in (('B', B), ('C', C)):
        per_token = isinstance(x, Tensor) and x.dim() > 2 + len(lead)
        check_beside(op, name, x, u, activations if per_token else parameters, 'u')
    check_beside(op, 'D', D, u, parameters, 'u', optional=True)
    check_beside(op, 'z', z, u, activations, 'u', optional=True)
    check_beside(op, bias_name, dt_bias, u, parameters, 'u', optional=True)

    if u.dim() != 3 + len(lead) or u.shape[: len(lead)] != lead:
        tokens = ('B', 'D', 'L') if channels_first else ('B', 'L', 'D')
        fail(op, 'u', f'has shape {shape_of(u)}, must be ({", ".join(map(str, lead + tokens))})')
    dim = u.shape[-2 if channels_first else -1]
    check_same_shape(op, dt_name, dt, u, 'u')
    check_shape(op, 'z', z, u.shape[len(lead) :], u, 'u')
    check_shape(op, 'A', A, (*lead, dim), u, 'u', free='N')
    n = A.shape[-1]
    if n > MAX_STATE_SIZE:
        fail(op, 'A', f'has shape {shape_of(A)}: state size {n}, legal are 1 to {MAX_STATE_SIZE}')
    check_shape(op, 'D', D, (*lead, dim), u, 'u')
    check_shape(op, bias_name, dt_bias, (*lead, dim), u, 'u')
    groups_B, groups_C = (_groups(op, name, x, u, A, channels_first) for name, x in (('B', B), ('C', C)))
    if groups_B != groups_C and min(groups_B, groups_C) > 1:
        fail(op, 'C', f'has {groups_C} groups, B has {groups_B}; they must be equal unless one of them is 1')


def _groups(op: str, name: str, x: Tensor, u: Tensor, A: Tensor, channels_first: bool) -> int:
    """Groups of channels in x, which is B or C; 0 if it has no dimension for them. ValueError if its shape is wrong."""
    *lead, dim, n = A.shape
    batch, length = u.shape[-3], u.shape[-1 if channels_first else -2]
    dims = x.dim() - len(lead)
    groups = x.shape[1 if channels_first else -2] if dims == 4 else 0

    def shape(dims: int, groups: int | str) -> tuple[int | str, ...]:
        if dims == 2:
            return (*lead, dim, n)
        middle = (groups,) if dims == 4 else ()
        return (*lead, batch, *middle, n, length) if channels_first else (*lead, batch, length, *middle, n)

    if dims not in (2, 3, 4) or x.shape != shape(dims, groups):
        constant, shared, grouped = (f'({", ".join(map(str, shape(dims, "G")))})' for dims in (2, 3, 4))
        legal = f'{constant}, {shared} or {grouped} for u of shape {shape_of(u)} and A of {shape_of(A)}'
        fail(op, name, f'has shape {shape_of(x)}, must be {legal}')
    if groups and dim % groups:
        fail(op, name, f'has shape {shape_of(x)}: {groups} groups must divide the {dim} channels of u')
    return groups
