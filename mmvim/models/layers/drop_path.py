"""Stochastic depth."""

from mmcv.cnn.bricks import DropPath
from torch import nn


def drop_path(rate: float) -> nn.Module:
    """Stochastic depth of this rate; the identity for a rate of 0."""
    return DropPath(rate) if rate > 0 else nn.Identity()


def drop_path_rates(rate: float, depth: int) -> list[float]:
    """Rates of blocks, from 0 in the first one to this rate in the last one."""
    return [rate * i / max(depth - 1, 1) for i in range(depth)]
