"""Normalisation layers that the hosts lack."""

import torch.nn.functional as F
from torch import Tensor, nn

from mmvim.arguments import check_numbers, check_positive
from mmvim.registry import MODELS


@MODELS.register_module('LN2d')
class LayerNorm2d(nn.LayerNorm):
    """Layer normalisation over the channels of maps (B, C, H, W).

    Args:
        num_channels: channels C.
        eps: added to the variance.
        kwargs: the other arguments of torch.nn.LayerNorm.
    """

    def __init__(self, num_channels: int, eps: float = 1e-6, **kwargs) -> None:
        check_numbers(num_channels=num_channels)
        check_positive(eps=eps)
        super().__init__(num_channels, eps=eps, **kwargs)
        self.num_channels = num_channels

    def forward(self, x: Tensor) -> Tensor:
        """Maps (B, C, H, W) -> maps of the same shape."""
        x = F.layer_norm(x.permute(0, 2, 3, 1), self.normalized_shape, self.weight, self.bias, self.eps)
        return x.permute(0, 3, 1, 2)
