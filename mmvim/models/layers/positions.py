"""Tables of absolute positions, interpolated to the grid of an image."""

from collections import OrderedDict
from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.utils._python_dispatch import is_in_torch_dispatch_mode

from mmvim.models.layers.precision import at_least_float32
from mmvim.models.layers.shapes import surely_equal

# h x w grid of patches, L tokens with class tokens, D width


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
