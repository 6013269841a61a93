"""The part of a Mamba mixer between its projections, composed of the ops of this package: any backend, trainable."""

# B batch, L tokens, D channels, N state size, R rank of dt, W width

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from ...arguments import autocast_dtype
from ..causal_conv1d import bidirectional_causal_conv1d, causal_conv1d, same_conv1d
from ..selective_scan import bidirectional_selective_scan, selective_scan
from .weights import DirectionWeights


def mamba_inner_composed(
    x: Tensor,
    z: Tensor | None,
    weights: Sequence[DirectionWeights],
    scale: float,
    reverse: bool,
    padding: str,
    backend: str | None,
) -> Tensor:
    """One convolution, one product with x_proj and dt_proj, and one scan for all directions; see ``mamba_inner``."""
    if len(weights) == 1:
        return _one(x, z, weights[0], scale, reverse, padding, backend)
    conv, conv_bias, x_proj, dt_proj, A, D, dt_bias = (_stack(x, ws) for ws in zip(*weights, strict=True))
    u = bidirectional_causal_conv1d(x, conv, conv_bias, backend=backend)
    rank, n = dt_proj.shape[2], A.shape[2]
    rows = _project(u.flatten(1, 2), x_proj)
    dt, B, C = rows.split((rank, n, n), dim=-1)
    dt = _project(dt, dt_proj).to(u.dtype).view_as(u)
    B, C = (t.to(u.dtype).unflatten(1, u.shape[1:3]) for t in (B, C))
    return bidirectional_selective_scan(u, dt, A, B, C, D, z, dt_bias, dt_softplus=True, scale=scale, backend=backend)


def _stack(x: Tensor, weights: Sequence[Tensor | None]) -> Any:
    """One weight of both directions, zero for a direction without it; None if neither has it."""
    some = next((w for w in weights if w is not None), None)
    if some is None:
        return None
    both = [torch.zeros_like(some) if w is None else w for w in weights]
    if autocast_dtype(x) is not None:  # which refuses to stack float16 where it makes bfloat16, and the reverse
        both = [w.float() for w in both]
    return torch.stack(both)


def _project(x: Tensor, weight: Tensor) -> Tensor:
    """x times the transpose of weight, in the wider of both dtypes, or in autocast's."""
    dtype = autocast_dtype(x) or torch.promote_types(x.dtype, weight.dtype)
    return x.to(dtype) @ weight.to(dtype).mT


def _one(
    x: Tensor, z: Tensor | None, w: DirectionWeights, scale: float, reverse: bool, padding: str, backend: str | None
) -> Tensor:
    if padding == 'same':
        u = same_conv1d(x, w.conv_weight, w.conv_bias, backend=backend)
    else:
        u = causal_conv1d(x, w.conv_weight, w.conv_bias, reverse=reverse, backend=backend)
    n = w.A.shape[1]
    dt, B, C = _project(u, w.x_proj).split((w.dt_proj.shape[1], n, n), dim=-1)
    dt, B, C = _project(dt, w.dt_proj).to(u.dtype), B.to(u.dtype), C.to(u.dtype)
    y = selective_scan(u, dt, w.A, B, C, w.D, z, w.dt_bias, dt_softplus=True, reverse=reverse, backend=backend)
    return y if scale == 1.0 else y * scale
