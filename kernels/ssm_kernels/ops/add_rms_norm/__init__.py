"""Addition to the residual stream and RMSNorm of it: public function, argument checks and the table of backends.

Source: RMSNorm, arXiv 1910.07467, equation 4; before the mixer of a block, as in Mamba, arXiv 2312.00752.
"""

# T tokens, D channels

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

from ...arguments import (
    autocast_dtype,
    check_beside,
    check_number,
    check_same_shape,
    check_shape,
    check_tensor,
    fail,
    parameter_dtypes,
)
from ...dispatch import Backend, choose_backend, numba_why_not, triton_why_not
from .reference import add_rms_norm_reference

MAX_TRITON_DIM = 8192


def _triton_why_not(x: Tensor, dim: int) -> str | None:
    if dim > MAX_TRITON_DIM:
        return f'rows have {dim} channels; the kernel takes up to {MAX_TRITON_DIM}'
    return triton_why_not(x, dim)


def _load_triton() -> Callable:
    from .gpu import add_rms_norm_triton

    return add_rms_norm_triton


def _load_numba() -> Callable:
    from .cpu import add_rms_norm_numba

    return add_rms_norm_numba


BACKENDS = (
    Backend('triton', _triton_why_not, _load_triton),
    Backend('numba', numba_why_not, _load_numba),
    Backend('torch', lambda x, dim: None, lambda: add_rms_norm_reference),
)


def add_rms_norm(
    x: Tensor,
    residual: Tensor | None,
    weight: Tensor,
    *,
    eps: float = 1e-5,
    backend: str | None = None,
) -> tuple[Tensor, Tensor]:
    """``residual = residual + x``, ``out = residual / sqrt(mean(residual^2) + eps) * weight``, both returned.

    The mean is over the last dimension. Source: RMSNorm, arXiv 1910.07467, equation 4.

    Args:
        x: what the last block computed, (..., D), float32, float16, bfloat16 or float64.
        residual: the stream that it is added to, shape of x, float32 (float64 for float64 x); None starts the stream
            with x.
        weight: (D), float32 or dtype of x.
        eps: added to the mean square, finite and at least 0.
        backend: 'triton', 'numba' or 'torch'; None takes the first that can run these tensors.

    Returns:
        (out, residual), both of x's shape. out has x's dtype; under autocast a float32 x gives the autocast dtype.
        The new residual is float32 (float64 for float64 x); it may be x itself if the stream starts with a float32 x.

    Raises:
        ValueError: if a shape, dtype, device or option does not fit, naming the argument; or for an unknown backend.
        RuntimeError: if the forced backend cannot run these tensors, with its reason.
    """
    op = 'add_rms_norm'
    _check(op, x, residual, weight, eps)
    low = autocast_dtype(x)
    out_dtype = low if low is not None and x.dtype == torch.float32 else x.dtype
    run = choose_backend(op, BACKENDS, backend, x, x.shape[-1]).load()
    flat = [None if t is None else t.reshape(-1, t.shape[-1]) for t in (x, residual)]
    out, stream = run(*flat, weight, float(eps), out_dtype)
    return out.view(x.shape), stream.view(x.shape)


def _check(op: str, x: Tensor, residual: Tensor | None, weight: Tensor, eps: float) -> None:
    """Raises ValueError at the first argument that does not fit, with both shapes and what is legal."""
    check_tensor(op, 'x', x)
    wide = torch.float64 if x.dtype == torch.float64 else torch.float32
    check_beside(op, 'residual', residual, x, (wide,), optional=True)
    check_beside(op, 'weight', weight, x, parameter_dtypes(x))
    if x.dim() == 0:
        fail(op, 'x', 'has shape (), must be (..., D)')
    check_same_shape(op, 'residual', residual, x)
    check_shape(op, 'weight', weight, x.shape[-1:], x)
    check_number(op, 'eps', eps, least=0)
