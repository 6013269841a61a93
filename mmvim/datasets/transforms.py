"""Loading images, with errors that say what is wrong with one."""

import contextlib
import io
import os
from pathlib import PurePath

import cv2
import mmcv
import numpy as np
from mmcv.image.io import imread_flags
from mmcv.transforms import LoadImageFromFile as _LoadImageFromFile
from mmengine import fileio
from PIL import Image

from mmvim.arguments import check_choice, check_flags
from mmvim.datasets.json_files import irregular
from mmvim.errors import DataError
from mmvim.pixels import Range, scale_values, warn_once
from mmvim.registry import TRANSFORMS

# A decoder returns a picture with a grey rest for a file that ends early; these end marks show it.
_END_MARKS = ((b'\xff\xd8', b'\xff\xd9'), (b'\x89PNG', b'IEND\xaeB`\x82'))
_ANIMATED = (b'GIF8', b'RIFF', b'II*\0', b'MM\0*')  # formats of which a file may hold several pictures
_DEEP_MODES = ('I;16', 'I;16B', 'I;16L', 'I;16N', 'I', 'F')  # of Pillow, which cuts them off at 255
COLOR_TYPES = ('color', 'grayscale', 'unchanged', 'color_ignore_orientation', 'grayscale_ignore_orientation')
DECODERS = ('cv2', 'turbojpeg', 'pillow', 'tifffile')


def decode_image(
    data: bytes,
    path: str,
    color_type: str = 'color',
    backend: str = 'cv2',
    to_float32: bool = False,
    value_range: Range | None = None,
    stated: tuple[int, int] | None = None,
) -> np.ndarray:
    """Decode an image file, and refuse it if it is not complete.

    Args:
        data: content of the file.
        path: where it came from, for messages.
        color_type: 'color', 'grayscale' or 'unchanged', as in ``mmcv.imfrombytes``.
        backend: decoder, as in ``mmcv.imfrombytes``.
        to_float32: return float32 instead of uint8.
        value_range: the values that become 0 and 255; those beyond are cut off. If not given, an image of 16 bits keeps
            its upper 8, which is logged once for each folder.
        stated: height and width that it must have.

    Returns:
        Image (H, W, 3), blue first for 'color'.

    Raises:
        DataError: if the file is empty, no image, of another size, or ends early, or has other values than whole
            numbers of 8 or 16 bits and no ``value_range``.
    """
    try:
        if not data:
            raise OSError('the file is empty')
        _check_header(data, path, backend, stated)
        if not _ends_well(data):
            with Image.open(io.BytesIO(data)) as whole:
                whole.load()
        if backend == 'cv2' and color_type != 'unchanged':
            image = _decode_deep(data, imread_flags[color_type])
        else:
            image = mmcv.imfrombytes(data, flag=color_type, backend=backend)
        if image is None:
            raise OSError('not an image of a known format')
    except DataError:
        raise
    except Exception as error:
        reason = 'not an image of a known format' if 'cannot identify' in str(error) else str(error)
        raise DataError(
            f"image '{path}' cannot be read ({reason}): replace the file, or take it out of the annotation file; "
            'mmvim.CocoFolderDataset leaves such images out with skip_bad_images=True'
        ) from None
    _check_size(image.shape[:2], stated, path)
    if color_type != 'unchanged':
        image = scale_values(image, path, value_range, to_float32)
    return image.astype(np.float32) if to_float32 else image


def read_image(path: str, backend_args: dict | None = None, **settings) -> np.ndarray:
    """Read and decode an image file; arguments and errors as of :func:`decode_image`."""
    try:
        kind = irregular(os.stat(path).st_mode) if os.path.exists(path) else None
        if kind:
            raise DataError(f"image '{path}' is {kind}: correct its name in the annotation file, or remove it")
        data = fileio.get(path, backend_args=backend_args)
    except FileNotFoundError:
        raise DataError(f"image '{path}' does not exist: check the image folder and file names") from None
    except OSError as error:
        raise DataError(f"image '{path}' cannot be read ({error.strerror or error}): check its permissions") from None
    return decode_image(data, path, **settings)


def _ends_well(data: bytes) -> bool:
    tail = data[-64:].rstrip(b'\0\r\n ')
    return any(data.startswith(start) and tail.endswith(end) for start, end in _END_MARKS)


def _check_header(data: bytes, path: str, backend: str, stated: tuple[int, int] | None) -> None:
    """Refuse what its header rules out, before its pixels take memory."""
    try:
        with contextlib.suppress(Image.UnidentifiedImageError), Image.open(io.BytesIO(data)) as header:
            if stated and header.size not in (stated, stated[::-1]):  # an EXIF rotation may exchange them
                _check_size(header.size[::-1], stated, path)
            if backend == 'pillow' and header.mode in _DEEP_MODES:
                raise OSError("Pillow cuts off its values at 255; set imdecode_backend='cv2' and value_range")
            frames = getattr(header, 'n_frames', 1) if data.startswith(_ANIMATED) else 1
            if frames > 1:
                warn_once(path, f'holds {frames} pictures, of which the first is used')
    except Image.DecompressionBombError:
        # as many pixels as this may be meant, if the annotations say so
        if not stated or stated[0] * stated[1] < Image.MAX_IMAGE_PIXELS:
            raise


def _check_size(size: tuple[int, ...], stated: tuple[int, int] | None, path: str) -> None:
    if stated and tuple(size) != tuple(stated):
        raise DataError(
            f"image '{path}' has {size[0]} rows and {size[1]} columns, its annotations are for "
            f'{stated[0]} rows and {stated[1]} columns: correct height and width in the annotation file, or save '
            f'{PurePath(path).name} as it was annotated (an EXIF rotation may be the cause)'
        )


def _decode_deep(data: bytes, flag: int) -> np.ndarray | None:
    """Decode with all bits; OpenCV reads some grey images of real numbers as they are only."""
    array = np.frombuffer(data, np.uint8)
    image = cv2.imdecode(array, flag | cv2.IMREAD_ANYDEPTH)
    if image is None:
        image = cv2.imdecode(array, cv2.IMREAD_UNCHANGED)
        if image is not None and image.ndim == 2 and flag & cv2.IMREAD_COLOR:
            image = np.repeat(image[..., None], 3, 2)
    return image


def _check_value_range(value_range: object, color_type: str, backend: str) -> None:
    if value_range is None:
        return
    numbers = tuple(value_range) if isinstance(value_range, list | tuple) else ()
    if len(numbers) != 2 or any(type(n) not in (int, float) for n in numbers) or not numbers[0] < numbers[1]:
        raise ValueError(f'value_range must be None or two rising numbers, those of black and white: {value_range!r}')
    if color_type == 'unchanged' or backend != 'cv2':
        raise ValueError("value_range needs imdecode_backend='cv2' and a color_type other than 'unchanged'")


@TRANSFORMS.register_module()
class LoadImageFromFile(_LoadImageFromFile):
    """mmcv's transform of this name, with checks.

    It refuses an image that is unreadable, truncated or of another size than its annotations.

    Args:
        as in mmcv, without ``ignore_empty``: whether images may be left out is for the data set to decide.
        value_range: values of black and white in the files, such as (0, 4095) for measurements of 12 bits, which
            become 0 and 255. None for images of 8 bits; those of 16 then keep the upper 8, with a warning.

    Raises:
        ValueError: if an argument has no legal value.
        DataError: naming the file.
    """

    def __init__(
        self,
        to_float32: bool = False,
        color_type: str = 'color',
        imdecode_backend: str = 'cv2',
        backend_args: dict | None = None,
        value_range: Range | None = None,
    ) -> None:
        check_flags(to_float32=to_float32)
        check_choice('color_type', color_type, COLOR_TYPES)
        check_choice('imdecode_backend', imdecode_backend, DECODERS)
        _check_value_range(value_range, color_type, imdecode_backend)
        super().__init__(to_float32, color_type, imdecode_backend, backend_args=backend_args)
        self.value_range = value_range

    def transform(self, results: dict) -> dict:
        """Add ``img``, ``img_shape`` and ``ori_shape`` to a sample that has ``img_path``."""
        stated = (results.get('height'), results.get('width'))
        image = read_image(
            results['img_path'],
            self.backend_args,
            color_type=self.color_type,
            backend=self.imdecode_backend,
            to_float32=self.to_float32,
            value_range=self.value_range,
            stated=None if None in stated else stated,
        )
        results['img'] = image
        results['img_shape'] = results['ori_shape'] = image.shape[:2]
        return results
