"""Patch embedding that takes images of any size."""

from collections import OrderedDict
from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils._python_dispatch import is_in_torch_dispatch_mode

from mmvim.models.layers.precision import at_least_float32
from mmvim.models.layers.shapes import surely, surely_equal

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
        return tuple(self._patches(side) for side in (height, width))

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


def resize_pos_embed(pos_embed: Tensor, source: tuple[int, int], target: tuple[int, int], mode: str) -> Tensor:
    """Interpolate a table of absolute positions to another grid.

    Args:
        pos_embed: table (1, h*w, D) of patch positions only, in row-major order.
        source: its grid (h, w).
        target: the wanted grid (h, w).
        mode: interpolation of torch.nn.functional.interpolate, corners not aligned.

    Returns:
        Table (1, target h * target w, D) of the same dtype; the very table if the grids are equal.
    """
    if surely_equal(source, target):
        return pos_embed
    grid = pos_embed.reshape(1, *source, -1).permute(0, 3, 1, 2)
    align_corners = None if mode in ('nearest', 'area', 'nearest-exact') else False
    grid = F.interpolate(at_least_float32(grid), size=tuple(target), mode=mode, align_corners=align_corners)
    return grid.flatten(2).transpose(1, 2).to(pos_embed.dtype)


class PositionCache:
    """Keeps the interpolated tables of the last grids for inference on a CPU, where making one takes milliseconds.

    A kept table is used as long as the values that it was made of are the same, however they were written. Copies and
    pickles of the cache are empty.

    Args:
        size: number of grids.
        max_bytes: memory of all that is kept; a table that alone is larger is not kept.
    """

    def __init__(self, size: int = 4, max_bytes: int = 64 * 2**20) -> None:
        self.size = size
        self.max_bytes = max_bytes
        self.held: OrderedDict[tuple[int, int], tuple[Tensor, Tensor]] = OrderedDict()

    def __reduce__(self) -> tuple:
        return type(self), (self.size, self.max_bytes)

    @property
    def nbytes(self) -> int:
        """Bytes of all that is kept."""
        return sum(tensor.nbytes for entry in self.held.values() for tensor in entry)

    def get(self, table: Tensor, grid: tuple[int, int], make: Callable[[], Tensor]) -> Tensor:
        """``make()``, or what it returned before for this grid and a table (1, L, D) of these values."""
        traced = torch.compiler.is_compiling() or torch.jit.is_tracing() or is_in_torch_dispatch_mode()
        if torch.is_grad_enabled() or table.device.type != 'cpu' or traced:
            return make()
        held = self.held.pop(grid, None)
        if held is None or held[0].dtype != table.dtype or not torch.equal(held[0], table):
            held = table.detach().clone(), make()
        self.held[grid] = held
        while len(self.held) > self.size or self.nbytes > self.max_bytes:
            self.held.popitem(last=False)
        return held[1]


def square_grid(num_patches: int) -> tuple[int, int] | None:
    """The square grid with this many patches, or None if there is none."""
    side = int(round(num_patches**0.5))
    return (side, side) if side * side == num_patches else None


def lecun_normal_(weight: Tensor) -> Tensor:
    """Fill a convolution weight (out, in, kh, kw) in place from the truncated normal with variance 1 / fan-in."""
    fan_in = weight[0].numel()
    # 0.8796... is the standard deviation of a unit normal truncated at two standard deviations.
    std = fan_in**-0.5 / 0.87962566103423978
    with torch.no_grad():
        return nn.init.trunc_normal_(weight, std=std, a=-2 * std, b=2 * std)
