"""Values and channels of images, brought to what the models take: three channels from 0 to 255."""

import os

import numpy as np
from mmengine.logging import print_log

from mmvim.errors import DataError

Range = tuple[float, float]
_warned: set[tuple[str, str]] = set()


def warn_once(path: str, text: str) -> None:
    """Warn once for each folder and kind; a fault of one image is mostly that of all."""
    key = (os.path.dirname(path), text[:12])
    if key not in _warned:
        _warned.add(key)
        print_log(f"image '{path}' {text}; other images of this folder are not named", 'current', 30)


def scale_values(
    image: np.ndarray, path: str, value_range: Range | None = None, to_float32: bool = False
) -> np.ndarray:
    """Bring values to 0 to 255.

    Args:
        image: of any type.
        path: where it came from, for messages.
        value_range: the values that become 0 and 255. If not given, an image of 16 bits keeps its upper 8, with a
            warning.
        to_float32: do not round.

    Raises:
        DataError: if the type of the values does not say what is white, and ``value_range`` neither.
    """
    if value_range is not None:
        low, high = value_range
        image = ((image.astype(np.float32) - low) * (255 / (high - low))).clip(0, 255)
        if not np.isfinite(image).all():
            raise DataError(f"image '{path}' has values that are not finite: replace them")
        return image if to_float32 else np.rint(image).astype(np.uint8)
    if image.dtype == np.uint8:
        return image
    found = f'{image.min()} to {image.max()}'
    if image.dtype != np.uint16:
        raise DataError(
            f"image '{path}' has values of type {image.dtype} ({found}): set value_range of mmvim.LoadImageFromFile "
            'to those that mean black and white'
        )
    warn_once(
        path,
        f'has 16 bits per value ({found}), of which the lower 8 are dropped: set value_range=[{image.min()},'
        f'{image.max()}], or what means black and white in all images, to keep what they show',
    )
    return (image >> 8).astype(np.uint8)


def three_channels(array: np.ndarray) -> np.ndarray:
    """An array (H, W), (H, W, 1) or (H, W, 4) as (H, W, 3), as files are read: grey repeated, opacity left out.

    Arrays of other numbers of channels are left to models that take them.

    Raises:
        DataError: if it is no image of height, width and channels.
    """
    if array.ndim == 2:
        array = array[..., None]
    if array.ndim != 3 or not array.size or (array.shape[0] in (1, 3) and array.shape[2] > 4):
        raise DataError(
            f'an array of shape {array.shape} is no image: pass (height, width), or (height, width, channels) with 1, '
            '3 or 4 channels, blue first'
        )
    if array.shape[2] == 4:
        warn_once('array', "has a fourth channel, which is left out; color_type='unchanged' in its loader keeps it")
    return {1: np.repeat(array, 3, 2), 4: array[..., :3]}.get(array.shape[2], array)


def image_of_array(array: np.ndarray, value_range: Range | None = None) -> np.ndarray:
    """An array as an image of three channels with values from 0 to 255.

    Raises:
        DataError: if its shape or values are not those of an image.
    """
    array = three_channels(array)
    kind, found = array.dtype.kind, ''
    if kind in 'uif':
        found = f' with values {array.min()} to {array.max()}'
    if kind not in 'uif' or not np.isfinite(array).all():
        raise DataError(f'an array of type {array.dtype}{found} is no image: pass numbers from 0 to 255')
    if value_range is not None or array.dtype == np.uint16:
        return scale_values(array, 'array', value_range)
    in_range = array.min() >= 0 and array.max() <= 255
    if kind == 'f':  # a model may be meant for other values
        if not in_range or 0 < array.max() <= 1:
            warn_once('array', f'has values of type {array.dtype}{found}: models for files expect 0 to 255')
        return array.astype(np.float32)
    if not in_range:
        raise DataError(f'an array of type {array.dtype}{found} is no image: pass numbers from 0 to 255')
    return array.astype(np.uint8)
