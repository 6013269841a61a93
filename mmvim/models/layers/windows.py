"""Windows of a map: how large they are, cutting the map into them and putting it together again."""

import torch
import torch.nn.functional as F
from torch import Tensor

# B batch, C channels, H x W map, h x w window, K windows in a map


def window_shape(size: tuple[int, int], window: int, fit: bool) -> tuple[int, int]:
    """Shape (h, w) of the windows of a map.

    Args:
        size: height and width of the map.
        window: side of a window as configured.
        fit: take, along each axis, as few windows of at most this side as cover the map, all equally long and no
            longer than they must be; a map smaller than the window is one window of its own size. Otherwise every
            window is as large as configured.
    """
    if not fit:
        return window, window
    height, width = (-(-side // -(-side // window)) for side in size)
    return height, width


def to_windows(x: Tensor, window: tuple[int, int], size: tuple[int, int]) -> Tensor:
    """Map (B, C, H, W), padded with zeros on the right and at the bottom -> tokens (B*K, h*w, C), all row-major.

    Args:
        x: the map.
        window: height and width of a window.
        size: H and W; an export with free sizes may know them in a simpler form than as sizes of the map.
    """
    (h, w), (height, width) = window, size
    rows, columns = _counts(window, size)
    x = x.permute(0, 2, 3, 1)
    if torch.compiler.is_exporting():
        return _gather_windows(x, window, size)
    if (height, width) != (rows * h, columns * w):
        x = F.pad(x, (0, 0, 0, columns * w - width, 0, rows * h - height))
    x = x.reshape(x.shape[0], rows, h, columns, w, x.shape[-1]).transpose(2, 3)
    return x.reshape(-1, h * w, x.shape[-1])


def from_windows(x: Tensor, window: tuple[int, int], images: int, size: tuple[int, int]) -> Tensor:
    """Tokens (B*K, h*w, C) of B images' maps cut by `to_windows` -> maps (B, C, H, W) without what was padded."""
    (h, w), (height, width) = window, size
    rows, columns = _counts(window, size)
    if torch.compiler.is_exporting():
        x = _gather_map(x, window, images, size)
    else:
        x = x.reshape(images, rows, columns, h, w, x.shape[-1]).transpose(2, 3)
        x = x.reshape(images, rows * h, columns * w, x.shape[-1])[:, :height, :width]
    return x.permute(0, 3, 1, 2)


def _counts(window: tuple[int, int], size: tuple[int, int]) -> tuple[int, int]:
    """Rows and columns of windows that cover a map."""
    return -(-size[0] // window[0]), -(-size[1] // window[1])


# Views and padding make an export decide by its example whether a map is one window wide, and whether it is padded.
# Indices compute the same and leave it open.


def _gather_windows(x: Tensor, window: tuple[int, int], size: tuple[int, int]) -> Tensor:
    (h, w), (height, width), (rows, columns) = window, size, _counts(window, size)
    count = torch.arange(x.shape[0] * rows * columns, device=x.device)[:, None]
    place = torch.arange(h * w, device=x.device)[None]
    image, k = count // (rows * columns), count % (rows * columns)
    row, column = k // columns * h + place // w, k % columns * w + place % w
    tokens = x[image, row.clamp(max=height - 1), column.clamp(max=width - 1)]
    return tokens.where(((row < height) & (column < width))[..., None], 0)


def _gather_map(x: Tensor, window: tuple[int, int], images: int, size: tuple[int, int]) -> Tensor:
    (h, w), (rows, columns) = window, _counts(window, size)
    image = torch.arange(images, device=x.device)[:, None, None]
    row = torch.arange(size[0], device=x.device)[:, None]
    column = torch.arange(size[1], device=x.device)[None]
    return x[image * (rows * columns) + row // h * columns + column // w, row % h * w + column % w]
