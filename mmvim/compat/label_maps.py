"""MMSegmentation's loading of label maps, without the loss of what one byte cannot hold."""

from types import ModuleType
from typing import Any

import numpy as np

from mmvim.compat.import_hook import when_imported
from mmvim.errors import ConfigError, DataError

IGNORED = 255  # what MMSegmentation makes of 0 for reduce_zero_label, and of classes that are left out


def read_label_maps_as_they_are() -> None:
    """Replace how MMSegmentation's LoadAnnotations decodes a file."""
    when_imported('mmseg.datasets.transforms.loading', _replace)


def _replace(module: ModuleType) -> None:
    module.LoadAnnotations._load_seg_map = _load_seg_map


def _load_seg_map(self: Any, results: dict) -> None:
    """MMSegmentation's method of this name, with checks."""
    from mmengine import fileio

    path = results['seg_map_path']
    try:
        data = fileio.get(path, backend_args=self.backend_args)
    except FileNotFoundError:
        raise DataError(f"label map '{path}' does not exist: add it, or take its image out of the data set") from None
    labels = decode_label_map(data, path, self.imdecode_backend)
    if self.reduce_zero_label is None:
        self.reduce_zero_label = results['reduce_zero_label']
    if self.reduce_zero_label != results['reduce_zero_label']:
        raise ConfigError(
            f'LoadAnnotations has reduce_zero_label={self.reduce_zero_label}, its data set '
            f'{results["reduce_zero_label"]}: set it in the data set alone'
        )
    results['gt_seg_map'] = relabel(labels, path, self.reduce_zero_label, results.get('label_map'))
    results['seg_fields'].append('gt_seg_map')


def decode_label_map(data: bytes, path: str, backend: str = 'pillow') -> np.ndarray:
    """Decode a label map.

    Args:
        data: content of the file.
        path: where it came from, for messages.
        backend: decoder, as in ``mmcv.imfrombytes``.

    Returns:
        Labels (H, W): uint8, or uint16 if a value needs it.

    Raises:
        DataError: if it cannot be read, has several channels, or a value that is no whole number from 0 to 65535.
    """
    import mmcv

    try:
        labels = mmcv.imfrombytes(data, flag='unchanged', backend=backend) if data else None
        reason = 'not an image of a known format' if data else 'the file is empty'
    except Exception as error:
        labels, reason = None, 'not an image of a known format' if 'cannot identify' in str(error) else str(error)
    if labels is None:
        raise DataError(f"label map '{path}' cannot be read ({reason}): replace the file")
    if labels.ndim == 3 and labels.shape[2] == 1:
        labels = labels[..., 0]
    if labels.ndim != 2:
        raise DataError(f"label map '{path}' {_channels(labels)}")
    return _whole_numbers(labels, path)


def _channels(labels: np.ndarray) -> str:
    if labels.ndim != 3:
        return f'has the shape {labels.shape}: save one image with one channel'
    colours = labels[..., :3] if labels.shape[2] > 2 else labels[..., :1]
    same = bool((colours == colours[..., :1]).all())
    remedy = (
        "all colours are the same, so PIL's image.getchannel(0) is the label map"
        if same
        else 'colours must be turned into the indices of classes'
    )
    return f'has {labels.shape[2]} channels, a label map has one, with the index of the class of each pixel: {remedy}'


def _whole_numbers(labels: np.ndarray, path: str) -> np.ndarray:
    if labels.dtype in (np.uint8, bool):
        return labels.astype(np.uint8)
    if labels.dtype.kind == 'f':
        wrong = labels[~(np.isfinite(labels) & (labels == np.floor(labels)))]
        if wrong.size:
            raise DataError(
                f"label map '{path}' has the value {wrong[0]} ({labels.dtype}): save whole numbers, the indices of "
                'the classes, as 8-bit PNG'
            )
    wrong = labels[(labels < 0) | (labels > 65535)]
    if wrong.size:
        raise DataError(
            f"label map '{path}' has the value {wrong[0]} ({labels.dtype}): values are the indices of classes, from 0"
        )
    return labels.astype(np.uint8 if labels.max(initial=0) <= 255 else np.uint16)


def relabel(
    labels: np.ndarray, path: str, reduce_zero_label: bool = False, label_map: dict[int, int] | None = None
) -> np.ndarray:
    """What MMSegmentation makes of a label map: 0 becomes 255 and the rest one less, then classes are renumbered.

    Raises:
        DataError: for ``reduce_zero_label`` and a value above 255, where 255 would be a class and the value to ignore.
    """
    if reduce_zero_label:
        if labels.dtype != np.uint8:
            raise DataError(
                f"label map '{path}' has the value {labels.max()}, and reduce_zero_label, which makes 0 the value "
                f'{IGNORED}, is for label maps up to {IGNORED}: number the classes from 0 in the files'
            )
        labels = np.where(np.isin(labels, (0, IGNORED)), IGNORED, labels - 1).astype(np.uint8)
    if not label_map:
        return labels
    renumbered = labels.copy()
    for old, new in label_map.items():
        renumbered[labels == old] = new
    return renumbered
