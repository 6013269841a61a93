"""Loading images, with errors that say what is wrong with one."""

import io
from pathlib import PurePath

import mmcv
import numpy as np
from mmcv.transforms import LoadImageFromFile as _LoadImageFromFile
from mmengine import fileio
from PIL import Image

from mmvim.arguments import check_choice, check_flags
from mmvim.errors import DataError
from mmvim.registry import TRANSFORMS

# A decoder returns a picture with a grey rest for a file that ends early; these end marks show it.
_END_MARKS = ((b'\xff\xd8', b'\xff\xd9'), (b'\x89PNG', b'IEND\xaeB`\x82'))


def decode_image(
    data: bytes, path: str, color_type: str = 'color', backend: str = 'cv2', to_float32: bool = False
) -> np.ndarray:
    """Decode an image file, and refuse it if it is not complete.

    Args:
        data: content of the file.
        path: where it came from, for messages.
        color_type: 'color', 'grayscale' or 'unchanged', as in ``mmcv.imfrombytes``.
        backend: decoder, as in ``mmcv.imfrombytes``.
        to_float32: return float32 instead of uint8.

    Returns:
        Image (H, W, 3), blue first for 'color'.

    Raises:
        DataError: if the file is empty, no image, or ends early.
    """
    try:
        if not data:
            raise OSError('the file is empty')
        if not _ends_well(data):
            with Image.open(io.BytesIO(data)) as image:
                image.load()
        image = mmcv.imfrombytes(data, flag=color_type, backend=backend)
        if image is None:
            raise OSError('not an image of a known format')
    except Exception as error:
        reason = 'not an image of a known format' if 'cannot identify' in str(error) else str(error)
        raise DataError(
            f"image '{path}' cannot be read ({reason}): replace the file, or take it out of the annotation file; "
            'mmvim.CocoFolderDataset leaves such images out with skip_bad_images=True'
        ) from None
    return image.astype(np.float32) if to_float32 else image


def _ends_well(data: bytes) -> bool:
    tail = data[-64:].rstrip(b'\0\r\n ')
    return any(data.startswith(start) and tail.endswith(end) for start, end in _END_MARKS)


COLOR_TYPES = ('color', 'grayscale', 'unchanged', 'color_ignore_orientation', 'grayscale_ignore_orientation')
DECODERS = ('cv2', 'turbojpeg', 'pillow', 'tifffile')


@TRANSFORMS.register_module()
class LoadImageFromFile(_LoadImageFromFile):
    """mmcv's transform of this name, with checks.

    It refuses an image that is unreadable, truncated or of another size than its annotations.

    Args:
        as in mmcv, without ``ignore_empty``: whether images may be left out is for the data set to decide.

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
    ) -> None:
        check_flags(to_float32=to_float32)
        check_choice('color_type', color_type, COLOR_TYPES)
        check_choice('imdecode_backend', imdecode_backend, DECODERS)
        super().__init__(to_float32, color_type, imdecode_backend, backend_args=backend_args)

    def transform(self, results: dict) -> dict:
        """Add ``img``, ``img_shape`` and ``ori_shape`` to a sample that has ``img_path``."""
        path = results['img_path']
        try:
            data = fileio.get(path, backend_args=self.backend_args)
        except FileNotFoundError:
            raise DataError(f"image '{path}' does not exist: check the image folder and file names") from None
        image = decode_image(data, path, self.color_type, self.imdecode_backend, self.to_float32)
        stated = (results.get('height'), results.get('width'))
        if None not in stated and stated != image.shape[:2]:
            raise DataError(
                f"image '{path}' has {image.shape[0]} rows and {image.shape[1]} columns, its annotations are for "
                f'{stated[0]} rows and {stated[1]} columns: correct height and width in the annotation file, or save '
                f'{PurePath(path).name} as it was annotated (an EXIF rotation may be the cause)'
            )
        results['img'] = image
        results['img_shape'] = results['ori_shape'] = image.shape[:2]
        return results
