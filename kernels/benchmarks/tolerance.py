"""How close a backend must come to float64; shared by the cases of all ops."""

from __future__ import annotations

import torch
from torch import Tensor

FLOOR = {torch.float32: 1e-6, torch.bfloat16: 4e-3, torch.float16: 5e-4}  # of the largest value


def error(x: Tensor, exact: Tensor) -> float:
    """Largest deviation as a share of the largest exact value."""
    return ((x.double() - exact).abs().max() / exact.abs().max().clamp_min(1e-30)).item()


def deviations(ours: dict[str, Tensor], plain: dict[str, Tensor], exact: dict[str, Tensor]) -> list[str]:
    """Results that are off by more than twice what plain PyTorch loses in the same dtype, by name."""
    found = []
    for name, x in ours.items():
        off, allowed = error(x, exact[name]), max(2 * error(plain[name], exact[name]), FLOOR[x.dtype])
        if x.dtype != plain[name].dtype or x.shape != plain[name].shape:
            found.append(f'{name}: {x.dtype} {tuple(x.shape)}, must be {plain[name].dtype} {tuple(plain[name].shape)}')
        elif not off <= allowed:
            found.append(f'{name}: error {off:.2e}, allowed {allowed:.2e}')
    return found
