"""Residual addition and RMSNorm in plain PyTorch, on any device and in any floating dtype: what backends must equal.

Source: RMSNorm, arXiv 1910.07467, equation 4.
"""

# T tokens, D channels

from __future__ import annotations

import torch
from torch import Tensor


def add_rms_norm_reference(
    x: Tensor, residual: Tensor | None, weight: Tensor, eps: float, out_dtype: torch.dtype
) -> tuple[Tensor, Tensor]:
    """``residual = residual + x``, ``out = residual / sqrt(mean(residual^2) + eps) * weight``.

    Args:
        x: (T, D).
        residual: (T, D) in float32 (float64 for float64 x), or None for zeros.
        weight: (D).
        eps: added to the mean square.
        out_dtype: dtype of out.

    Returns:
        out (T, D) and the new residual (T, D) in float64 for float64 x, in float32 otherwise; the computation is in
        that dtype too. Without a residual, a float32 x may itself be the new one.
    """
    dtype = torch.float64 if x.dtype == torch.float64 else torch.float32
    stream = x.to(dtype) if residual is None else residual + x
    rstd = torch.rsqrt(stream.square().mean(-1, keepdim=True) + eps)
    return (stream * rstd * weight.to(dtype)).to(out_dtype), stream
