"""Windows of a map: how large they are, cutting the map into them and putting it together again."""

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


def to_windows(x: Tensor, window: tuple[int, int]) -> Tensor:
    """Map (B, C, H, W), padded with zeros on the right and at the bottom -> tokens (B, K, h*w, C), all row-major."""
    h, w = window
    x = x.permute(0, 2, 3, 1)
    bottom, right = -x.shape[1] % h, -x.shape[2] % w
    if bottom or right:
        x = F.pad(x, (0, 0, 0, right, 0, bottom))
    batch, height, width, channels = x.shape
    x = x.reshape(batch, height // h, h, width // w, w, channels).transpose(2, 3)
    return x.reshape(batch, (height // h) * (width // w), h * w, channels)


def from_windows(x: Tensor, window: tuple[int, int], size: tuple[int, int]) -> Tensor:
    """Tokens (B, K, h*w, C) of a map cut by `to_windows` -> the map (B, C, H, W) without what was padded."""
    (h, w), (height, width) = window, size
    rows, columns = -(-height // h), -(-width // w)
    x = x.reshape(x.shape[0], rows, columns, h, w, x.shape[-1]).transpose(2, 3)
    x = x.reshape(x.shape[0], rows * h, columns * w, x.shape[-1])
    return x[:, :height, :width].permute(0, 3, 1, 2)
