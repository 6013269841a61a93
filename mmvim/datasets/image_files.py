"""What can be told of an image file without decoding it."""

import os
import stat
import time
import unicodedata
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import Any, BinaryIO, NamedTuple
from urllib.parse import unquote

import mmcv
import numpy as np
from PIL import Image

from mmvim.errors import DataError
from mmvim.pixels import warn_once

THREADS = 8
END_MARKS = {'JPEG': b'\xff\xd9', 'PNG': b'IEND\xaeB`\x82'}
IMAGES = ('.jpg', '.jpeg', '.png', '.tif', '.tiff', '.bmp', '.webp')
ORIENTATION = 0x0112  # EXIF
BITS_PER_SAMPLE = 258  # TIFF


class Header(NamedTuple):
    """Height and width of an image as stored, its EXIF orientation, mode, format and bits per value."""

    size: tuple[int, int]
    orientation: int = 1
    mode: str = ''
    format: str = ''
    bits: int = 8


def problem(path: str, hint: bool = True) -> str | None:
    """Why a file cannot be used, to follow its name; None if it is a file with something in it.

    The hint is a similar name, for which the folder is listed.
    """
    try:
        state = os.stat(path)
    except FileNotFoundError:
        return f'does not exist{similar(path) if hint else ""}'
    except OSError as error:
        return f'cannot be opened ({error.strerror})'
    if not stat.S_ISREG(state.st_mode):
        return 'is a folder' if stat.S_ISDIR(state.st_mode) else 'is no regular file'
    return None if state.st_size else 'is empty'


def similar(path: str) -> str:
    """What there is in place of a file that does not exist: a name that differs in suffix, case or spelling."""
    folder, name = os.path.split(path)
    if os.path.islink(path):
        return f", as the link points to '{os.readlink(path)}'"
    if not os.path.isdir(folder):
        return f" (nor does its folder '{folder}')"
    close = sorted(other for other in os.listdir(folder) if _spelling(other) == _spelling(name))
    return f' ({ascii(close[0]) if _looks(close[0]) == _looks(name) else repr(close[0])} does)' if close else ''


def _looks(name: str) -> str:
    return unicodedata.normalize('NFC', name)


def _spelling(name: str) -> str:
    """A name without what exporters change: suffix, case, blanks, %20 in place of a blank, composed accents."""
    return os.path.splitext(_looks(unquote(name)).strip())[0].casefold()


def in_time(work: Callable, items: Sequence, seconds: float) -> list:
    """Results of a function in threads, in the order of items, without those not begun after so many seconds."""
    end = time.monotonic() + seconds
    with ThreadPoolExecutor(THREADS) as pool:
        results = list(pool.map(lambda item: work(item) if time.monotonic() < end else None, items))
    return [result for result in results if result is not None]


def read_header(what: str, path: str) -> Header | None:
    """Header of a file; None if PIL cannot read it.

    Raises:
        DataError: if the file ends early.
    """
    with open(path, 'rb') as file:
        try:
            image = Image.open(file)
            # a PNG looks for EXIF behind all its pixels
            orientation = image.getexif().get(ORIENTATION, 1) if 'exif' in image.info or image.format == 'TIFF' else 1
        except Exception:
            return None
        header = Header(image.size[::-1], orientation, image.mode, image.format or '', _bits(image, file))
        file.seek(max(0, os.fstat(file.fileno()).st_size - 64))
        if not file.read().rstrip(b'\0\r\n ').endswith(END_MARKS.get(header.format, b'\0')):
            try:
                image.load()
            except Exception as error:
                raise unreadable(what, path, error) from None
    return header


def _bits(image: Image.Image, file: BinaryIO) -> int:
    """Bits per value, of which the mode of PIL tells nothing for colours."""
    if image.format == 'PNG':
        file.seek(24)
        return file.read(1)[0]
    if image.format == 'TIFF':
        return max(getattr(image, 'tag_v2', {}).get(BITS_PER_SAMPLE) or (8,))
    return 8


def check_depth(path: str, header: Header | None, loader: Any) -> None:
    """Warn of an image whose lower bits the hosts' loader drops, and refuse one that it cannot read.

    Raises:
        DataError: if a value has more than 16 bits.
    """
    if header is None or header.bits <= 8 or loader is None:
        return
    ours = type(loader).__module__.startswith('mmvim.')  # names such images itself
    if ours or loader.color_type == 'unchanged' or loader.imdecode_backend not in (None, 'cv2'):
        return
    remedy = "load it with type='mmvim.LoadImageFromFile' and value_range=(black, white) in the pipeline"
    if header.bits > 16:
        raise DataError(f"image '{path}' has {header.bits} bits per value, which this pipeline cannot read: {remedy}")
    warn_once(path, f'has {header.bits} bits per value, of which the lower 8 are dropped: {remedy}')


def decode(path: str, color_type: str = 'color', backend: str = 'cv2') -> np.ndarray:
    """Decode an image file as ``mmcv.imfrombytes`` does.

    Raises:
        DataError: if that fails.
    """
    with open(path, 'rb') as file:
        data = file.read()
    try:
        image = mmcv.imfrombytes(data, flag=color_type, backend=backend)
    except Exception as error:
        raise unreadable('image', path, error) from None
    if image is None:
        raise unreadable('image', path, 'not an image of a known format')
    return image


def unreadable(what: str, path: str, error: object) -> DataError:
    """What to say of a file that cannot be decoded."""
    return DataError(f"{what} '{path}' cannot be read ({error}): replace the file")
