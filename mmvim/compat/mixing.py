"""MMDetection's transforms that mix images draw one that is there, fit its size, and do not lose masks."""

import inspect
from collections.abc import Callable, Sequence
from types import ModuleType

import numpy as np

from mmvim.compat.import_hook import when_imported
from mmvim.errors import ConfigError


def mix_any_images() -> None:
    """Change the transforms when they are imported."""
    when_imported('mmdet.datasets.transforms.transforms', _change)


class _OneFewer:
    """A data set whose length is its last index, the end of what Python's randint draws from."""

    def __init__(self, dataset: Sequence) -> None:
        self.dataset = dataset

    def __len__(self) -> int:
        return len(self.dataset) - 1

    def __getitem__(self, index: int) -> object:
        return self.dataset[index]

    def __getattr__(self, name: str) -> object:
        return getattr(self.dataset, name)


def _change(host: ModuleType) -> None:
    for transform in (host.Mosaic, host.MixUp, host.CopyPaste):
        draw = vars(transform)['get_indexes']  # mmcv's cache_randomness around a function
        if 'randint(0, len(dataset))' in inspect.getsource(draw.func):
            draw.func = _in_range(draw.func)
    for transform in (host.Mosaic, host.MixUp):
        if 'gt_masks' not in inspect.getsource(transform):
            transform.transform = _without_masks(transform.transform)
    paste, bitmaps = host.CopyPaste._copy_paste, host.BitmapMasks

    def copy_paste(self, dst_results: dict, src_results: dict) -> dict:
        """The host's, for a source that is first cut or padded to the size of the destination."""
        size = dst_results['img'].shape[:2]
        if src_results['img'].shape[:2] != size:
            masks = bitmaps(_fit(src_results['gt_masks'].masks, 1, size), *size)
            there = masks.masks.any(axis=(1, 2))
            src_results = {**src_results, 'img': _fit(src_results['img'], 0, size), 'gt_masks': masks[there]}
            src_results['gt_bboxes'] = src_results['gt_masks'].get_bboxes(type(src_results['gt_bboxes']))
            for key in ('gt_bboxes_labels', 'gt_ignore_flags'):
                src_results[key] = src_results[key][there]
        return paste(self, dst_results, src_results)

    host.CopyPaste._copy_paste = copy_paste


def _in_range(get_indexes: Callable) -> Callable:
    def new_get_indexes(self, dataset: Sequence) -> object:
        return get_indexes(self, _OneFewer(dataset))

    return new_get_indexes


def _without_masks(transform: Callable) -> Callable:
    def new_transform(self, results: dict) -> dict:
        """The host's, which would leave the masks of one image with the boxes of several.

        Raises:
            ConfigError: if there are masks.
        """
        if results.get('gt_masks') is not None:
            raise ConfigError(
                f'{type(self).__name__} of MMDetection moves boxes and not masks: set with_mask=False in '
                'LoadAnnotations, or use CopyPaste or CachedMosaic'
            )
        return transform(self, results)

    return new_transform


def _fit(array: np.ndarray, axis: int, size: tuple[int, int]) -> np.ndarray:
    """Cut or pad with zeros, at the lower and right end, the two axes from ``axis`` on."""
    shape = array.shape[:axis] + size + array.shape[axis + 2 :]
    part = tuple(slice(min(a, b)) for a, b in zip(shape, array.shape, strict=True))
    result = np.zeros(shape, array.dtype)
    result[part] = array[part]
    return result
