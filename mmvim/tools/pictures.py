"""Pictures of what `mmvim.tools.tracing` finds, as PNG files."""

import warnings
from pathlib import Path

import matplotlib.colors
import numpy as np
import torch
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from torch import Tensor

from mmvim.tools.tracing import Block, scan_directions

# C channels, h x w map, H x W image

CHANNELS = ('mean', 'max', 'norm', 'pca')
PANEL = 4.2  # side of one panel, inches
DPI = 110


def reduce_channels(features: Tensor, channels: str) -> np.ndarray:
    """One picture of a map (C, h, w).

    Args:
        features: the map.
        channels: 'mean', 'max' or 'norm' (Euclidean) over the channels, or the number of one, for (h, w); 'pca', the
            first three principal components of the tokens as red, green and blue, each from 0 to 1, for (h, w, 3).

    Raises:
        ValueError: if it is none of these, or there is no such channel.
    """
    features = features.detach().float()
    if channels == 'mean':
        return features.mean(0).numpy()
    if channels == 'max':
        return features.amax(0).numpy()
    if channels == 'norm':
        return features.norm(dim=0).numpy()
    if channels == 'pca':
        return _principal_components(features)
    if channels.isdigit() and int(channels) < len(features):
        return features[int(channels)].numpy()
    raise ValueError(f'channels must be one of {CHANNELS} or a number from 0 to {len(features) - 1}, got {channels!r}')


def _principal_components(features: Tensor) -> np.ndarray:
    tokens = features.flatten(1).T
    tokens = tokens - tokens.mean(0)
    _, _, axes = torch.linalg.svd(tokens, full_matrices=False)
    found = tokens @ axes[:3].T
    found = torch.cat((found, found.new_zeros(len(found), 3 - found.shape[1])), dim=1)
    low, high = found.amin(0), found.amax(0)
    return ((found - low) / (high - low).clamp_min(1e-12)).reshape(*features.shape[1:], 3).numpy()


def draw_features(path: Path, picture: np.ndarray, block: Block, channels: str) -> None:
    """The image, the reduced map, and the map over the image.

    Args:
        path: where the PNG file goes.
        picture: the image (H, W, 3), RGB, 8 bits.
        block: the block.
        channels: see `reduce_channels`.
    """
    values = reduce_channels(block.features, channels)
    figure, axes = _panels(1, 3, picture)
    extent = _extent(block)
    axes[0, 0].imshow(picture)
    shown = axes[0, 1].imshow(values, extent=extent, cmap='viridis')
    if values.ndim == 2:
        figure.colorbar(shown, ax=axes[0, 1], fraction=0.046)
    axes[0, 2].imshow(picture)
    axes[0, 2].imshow(values, extent=extent, cmap='viridis', alpha=0.6, interpolation='bilinear')
    channel_count, h, w = block.features.shape
    what = f'channel {channels}' if channels.isdigit() else f'{channels} of {channel_count} channels'
    _title(axes, [['image', what, 'over the image']])
    _save(figure, path, picture, f'features behind {block.name}, {h}x{w} positions')


def draw_receptive_field(
    path: Path, picture: np.ndarray, block: Block, field: Tensor, position: tuple[int, int]
) -> None:
    """The effective receptive field of a position: the gradient by size, and the smallest area that holds most of it.

    Args:
        path: where the PNG file goes.
        picture: the image (H, W, 3), RGB, 8 bits.
        block: the block.
        field: the gradient's size at every pixel (H, W).
        position: row and column in the block's map.
    """
    values = field.float().numpy()
    order = np.sort(values, axis=None)[::-1]
    total = order.sum()
    figure, axes = _panels(1, 3, picture)
    axes[0, 0].imshow(picture)
    largest = max(float(order[0]), 1e-30)
    logarithm = np.log10(np.maximum(values / largest, 1e-6))
    shown = axes[0, 1].imshow(logarithm, cmap='magma', vmin=-6, vmax=0)
    figure.colorbar(shown, ax=axes[0, 1], fraction=0.046, label='log10 of gradient / largest')
    axes[0, 2].imshow(picture)
    shares = []
    for share, colour in ((0.9, 'tab:orange'), (0.5, 'tab:red')):
        held = int(np.searchsorted(order.cumsum(), share * total)) + 1
        shares.append(f'{share:.0%} in {held / values.size:.1%} of the pixels')
        mask = np.zeros((*values.shape, 4))
        mask[values >= order[min(held, values.size) - 1]] = (*matplotlib.colors.to_rgb(colour), 0.6)
        axes[0, 2].imshow(mask)
    x, y = _centre(position, block)
    for axis in axes[0]:
        axis.plot(x, y, marker='+', markersize=12, markeredgewidth=2, color='cyan')
    _title(axes, [['image and position', 'gradient to the pixels', '; '.join(shares)]])
    _save(figure, path, picture, f'effective receptive field of position {position} of {block.name}')


def draw_scan(path: Path, picture: np.ndarray, block: Block, position: tuple[int, int]) -> None:
    """Order of the scan and decay of its state, one row a direction.

    Columns: the index of each token in its scan, with the way of the first tokens; the share of the state that
    outlives each token's step; and what is left of each token's contribution when the scan arrives at one position.

    Args:
        path: where the PNG file goes.
        picture: the image (H, W, 3), RGB, 8 bits.
        block: a block with a scan.
        position: row and column in the block's map.
    """
    directions = scan_directions(block)
    length = block.tokens.shape[1]
    scan, token = divmod(int(block.token_index[position]), length)
    figure, axes = _panels(len(directions), 3, picture)
    extent = _extent(block)
    titles = []
    for row, direction in zip(axes, directions, strict=True):
        index = (block.token_index % length).numpy()
        if direction.backward:
            index = length - 1 - index
        shown = row[0].imshow(index, extent=extent, cmap='cividis')
        figure.colorbar(shown, ax=row[0], fraction=0.046)
        _draw_way(row[0], block, direction.backward)
        kept = _on_map(direction.kept(), block)
        shown = row[1].imshow(kept, extent=extent, cmap='viridis')
        figure.colorbar(shown, ax=row[1], fraction=0.046)
        left = direction.kept().new_full(block.tokens.shape[:2], torch.nan)
        left[scan] = direction.reach(scan, token).to(left)
        with warnings.catch_warnings():
            warnings.simplefilter('ignore', RuntimeWarning)
            values = np.log10(np.maximum(_on_map(left, block), 1e-6))
        row[2].imshow(picture, alpha=0.35)
        shown = row[2].imshow(values, extent=extent, cmap='magma', vmin=min(-1.0, np.nanmin(values)), vmax=0)
        figure.colorbar(shown, ax=row[2], fraction=0.046)
        row[2].plot(*_centre(position, block), '+', ms=12, mew=2, color='cyan')
        titles.append(
            [
                f'{direction.name}: order in the scan',
                f'{direction.name}: share of state kept at a token',
                f'{direction.name}: log10 of what is left at +',
            ]
        )
    _title(axes, titles)
    scans = f', {len(block.tokens)} windows' if len(block.tokens) > 1 else ''
    _save(figure, path, picture, f'scan of {block.name}: {length} tokens{scans}; means over channels and states')


def _draw_way(axis: Axes, block: Block, backward: bool) -> None:
    """The way of the scan as a line through the token centres, with an arrow at the end of the first rows."""
    height, width = block.token_index.shape
    order = torch.argsort(block.token_index.flatten(), descending=backward).tolist()
    centres = np.array([_centre(divmod(i, width), block) for i in order])
    axis.plot(*centres.T, color='white', linewidth=0.6, alpha=0.7)
    axis.plot(*centres[0], 'o', color='tab:green', markersize=7)
    axis.plot(*centres[-1], 's', color='tab:red', markersize=7)
    for start in range(0, len(centres) - 1, width * -(-height // 8)):
        axis.annotate(
            '', centres[start + 1], centres[start], arrowprops=dict(arrowstyle='-|>', color='white', linewidth=1.2)
        )


def _on_map(values: Tensor, block: Block) -> np.ndarray:
    """Values of tokens (S, L) -> the map (h, w)."""
    return values.flatten()[block.token_index.to(values.device)].float().cpu().numpy()


def _centre(position: tuple[int, int], block: Block) -> tuple[float, float]:
    """Middle of a position of the map, as x and y in pixels."""
    row, column = (block.offset + (i + 0.5) * block.stride for i in position)
    return column, row


def _extent(block: Block) -> tuple[float, float, float, float]:
    """Left, right, bottom and top of the map, pixels."""
    (left, top), (right, bottom) = _centre((0, 0), block), _centre([n - 1 for n in block.token_index.shape], block)
    half = block.stride / 2
    return left - half, right + half, bottom + half, top - half


def _panels(rows: int, columns: int, picture: np.ndarray) -> tuple[Figure, np.ndarray]:
    ratio = min(max(picture.shape[0] / picture.shape[1], 0.25), 4)
    figure = Figure(figsize=(columns * PANEL, rows * PANEL * ratio + 0.6), dpi=DPI, layout='constrained')
    axes = figure.subplots(rows, columns, squeeze=False)
    for axis in axes.flat:
        axis.set_axis_off()
    return figure, axes


def _title(axes: np.ndarray, titles: list[list[str]]) -> None:
    for axis, title in zip(axes.flat, [title for row in titles for title in row], strict=True):
        axis.set_title(title, fontsize=8)


def _save(figure: Figure, path: Path, picture: np.ndarray, title: str) -> None:
    for axis in figure.axes:
        if axis.images and not str(axis.get_label()).startswith('<colorbar'):
            axis.set(xlim=(0, picture.shape[1]), ylim=(picture.shape[0], 0))
    figure.suptitle(title, fontsize=10)
    figure.savefig(path)
