"""Parameters of a Mamba mixer between its projections."""

# N state size, D channels, R rank of dt, W width

from __future__ import annotations

from typing import NamedTuple

from torch import Tensor


class DirectionWeights(NamedTuple):
    """Parameters of one direction.

    Attributes:
        conv_weight: (D, W) of the depthwise convolution, W from 2 to 4.
        conv_bias: (D) or None.
        x_proj: (R + 2N, D): u to (dt, B, C), in this order.
        dt_proj: (D, R).
        A: (D, N), negative.
        D: (D) skip connection, or None.
        dt_bias: (D), added before softplus, or None.
    """

    conv_weight: Tensor
    conv_bias: Tensor | None
    x_proj: Tensor
    dt_proj: Tensor
    A: Tensor
    D: Tensor | None
    dt_bias: Tensor | None
