"""The selective scan in plain PyTorch, on any device and in any floating dtype: what the other backends must equal.

Source: Mamba, arXiv 2312.00752, equation 2 and algorithm 2.
"""

# K directions (1 or 2), B batch, L tokens, D channels, N state size, G groups of channels

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor


def selective_scan_reference(
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
    """K scans over the same tokens, gated and summed: ``scale * (y_0 + ... + y_{K-1}) * silu(z)``.

    Args:
        u: (K, B, L, D).
        dt: (K, B, L, D).
        A: (K, D, N).
        B: (K, B, L, G, N) per token, or (K, D, N) constant.
        C: as B.
        D: (K, D) or None.
        z: gate (B, L, D) or None.
        dt_bias: (K, D) or None.
        dt_softplus: whether the step is softplus(dt + dt_bias) rather than dt + dt_bias.
        reverse: direction of the scan when K is 1; with K = 2 direction 0 runs left to right, 1 right to left.
        scale: factor of the result.

    Returns:
        y (B, L, D) in u's dtype and the states after the last step, (K, B, D, N). Computed in float64 for float64
        input, in float32 otherwise; the states have that dtype.
    """
    dtype = torch.float64 if u.dtype == torch.float64 else torch.float32
    wide = [None if x is None else x.to(dtype) for x in (u, dt, A, B, C, D, dt_bias)]
    with torch.autocast('cpu' if u.is_meta else u.device.type, enabled=False):  # autocast does not know meta
        ys, states = [], []
        for k in range(u.shape[0]):
            args: list[Any] = [None if x is None else x[k] for x in wide]
            y, h = _scan_one(dt_softplus, reverse if u.shape[0] == 1 else k == 1, *args)
            ys.append(y)
            states.append(h)
        y = sum(ys[1:], ys[0])
        if z is not None:
            y = y * F.silu(z.to(dtype))
        if scale != 1.0:
            y = y * scale
    return y.to(u.dtype), torch.stack(states)


def _scan_one(
    dt_softplus: bool, reverse: bool, u: Tensor, dt: Tensor, A: Tensor, B: Tensor, C: Tensor, D: Tensor | None,
    dt_bias: Tensor | None,
) -> tuple[Tensor, Tensor]:  # fmt: skip
    """h_l = exp(delta_l A) h_{l-1} + delta_l B_l u_l,  y_l = <C_l, h_l> + D u_l."""
    delta = dt if dt_bias is None else dt + dt_bias
    if dt_softplus:
        delta = F.softplus(delta)
    groups = max(x.shape[2] if x.dim() == 4 else 1 for x in (B, C))

    def grouped(x: Tensor) -> Tensor:
        return x.unflatten(-1, (groups, -1)).unsqueeze(-1)  # (B, L, G, D/G, 1)

    def at(x: Tensor, step: int) -> Tensor:
        return x.unflatten(0, (groups, -1)) if x.dim() == 2 else x[:, step].unsqueeze(2)  # broadcasts to (B, G, D/G, N)

    A = A.unflatten(0, (groups, -1))
    delta_g, delta_u = grouped(delta), grouped(delta * u)
    h = u.new_zeros(u.shape[0], *A.shape)
    ys = [h] * u.shape[1]
    for step in reversed(range(u.shape[1])) if reverse else range(u.shape[1]):
        h = torch.exp(delta_g[:, step] * A) * h + delta_u[:, step] * at(B, step)
        ys[step] = (h * at(C, step)).sum(-1).flatten(1)
    y = torch.stack(ys, 1)
    if D is not None:
        y = y + u * D
    return y, h.flatten(1, 2)
