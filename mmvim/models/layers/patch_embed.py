"""Patch embedding that takes images of any size."""

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from mmvim.models.layers.shapes import surely

# B batch, H x W image, h x w grid of patches, D width


class PatchEmbed(nn.Module):
    """Cut an image into patches and project each to a token.

    A side that leaves a partial patch is padded with zeros on the right or at the bottom, as the "corner"
    padding of the OpenMMLab patch embeddings does; a side shorter than one patch is padded to one patch.

    Args:
        in_channels: channels of the image.
        embed_dims: width D of a token.
        patch_size: side of a patch, pixels.
        patch_stride: distance between neighbouring patches, pixels.
    """

    def __init__(self, in_channels: int, embed_dims: int, patch_size: int, patch_stride: int) -> None:
        super().__init__()
        self.patch_size = patch_size
        self.patch_stride = patch_stride
        self.proj = nn.Conv2d(in_channels, embed_dims, patch_size, patch_stride)

    def grid_size(self, height: int, width: int) -> tuple[int, int]:
        """Grid (h, w) of an image of height x width pixels."""
        return self._patches(height), self._patches(width)

    def _patches(self, side: int) -> int:
        beyond = side - self.patch_size
        if not surely(beyond >= 0):
            beyond = max(beyond, 0)
        return (beyond + self.patch_stride - 1) // self.patch_stride + 1

    def forward(self, x: Tensor) -> tuple[Tensor, tuple[int, int]]:
        """Image (B, C, H, W) -> tokens (B, h*w, D) in row-major order, and the grid (h, w)."""
        height, width = x.shape[-2:]
        grid = self.grid_size(height, width)
        bottom, right = (
            (n - 1) * self.patch_stride + self.patch_size - side for n, side in zip(grid, (height, width), strict=True)
        )
        if bottom > 0 or right > 0:
            x = F.pad(x, (0, max(right, 0), 0, max(bottom, 0)))
        return self.proj(x).flatten(2).transpose(1, 2), grid


def lecun_normal_(weight: Tensor) -> Tensor:
    """Fill a convolution weight (out, in, kh, kw) in place from the truncated normal with variance 1 / fan-in."""
    fan_in = weight[0].numel()
    # 0.8796... is the standard deviation of a unit normal truncated at two standard deviations.
    std = fan_in**-0.5 / 0.87962566103423978
    with torch.no_grad():
        return nn.init.trunc_normal_(weight, std=std, a=-2 * std, b=2 * std)
