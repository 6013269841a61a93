"""The depthwise convolution in plain PyTorch, on any device and in any floating dtype: what backends must equal.

Source: the short convolution of Mamba, arXiv 2312.00752, section 3.4.
"""

# K directions (1 or 2), B batch, L tokens, D channels, W width

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor


def causal_conv1d_reference(x: Tensor, weight: Tensor, bias: Tensor | None, padding: str, silu: bool) -> Tensor:
    """K convolutions of the same tokens: ``act(bias + sum_j weight[j] x[tap(l, j)])``, zero beyond the ends.

    Args:
        x: (B, L, D).
        weight: (K, D, W).
        bias: (K, D) or None.
        padding: which tokens are read. 'causal', tap(l, j) = l - (W-1) + j; 'anticausal', l + (W-1) - j; 'both', the
            one for direction 0 and the other for direction 1; 'same', l - (W-1)//2 + j. K is 2 for 'both', else 1.
        silu: whether act is SiLU rather than nothing.

    Returns:
        (K, B, L, D) in x's dtype, computed in float64 for float64 input, in float32 otherwise.
    """
    dtype = torch.float64 if x.dtype == torch.float64 else torch.float32
    L, W = x.shape[1], weight.shape[2]
    directions = ('causal', 'anticausal') if padding == 'both' else (padding,)
    ys = []
    with torch.autocast('cpu' if x.is_meta else x.device.type, enabled=False):  # autocast does not know meta
        x_wide, weight = x.to(dtype), weight.to(dtype)
        for k, direction in enumerate(directions):
            taps = weight[k].flip(1) if direction == 'anticausal' else weight[k]
            left = {'causal': W - 1, 'anticausal': 0, 'same': (W - 1) // 2}[direction]
            padded = F.pad(x_wide, (0, 0, left, W - 1 - left))
            y = sum((padded[:, j : j + L] * taps[:, j] for j in range(W)), x_wide.new_zeros(()))
            if bias is not None:
                y = y + bias[k].to(dtype)
            ys.append(F.silu(y) if silu else y)
    return torch.stack(ys).to(x.dtype)
