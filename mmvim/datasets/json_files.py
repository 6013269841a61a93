"""Reading JSON from anywhere: regular files only, and one line for whatever is wrong with one."""

import gc
import json
import os
import reprlib
import stat

from mmengine.fileio import get_local_path

from mmvim.errors import DataError

_ARCHIVES = {b'\x1f\x8b': 'gzip', b'PK\x03\x04': 'zip', b'BZh': 'bzip2', b'\xfd7zXZ': 'xz', b'\x28\xb5\x2f\xfd': 'zstd'}
_KINDS = {
    stat.S_ISDIR: 'a folder',
    stat.S_ISFIFO: 'a pipe',
    stat.S_ISSOCK: 'a socket',
    stat.S_ISCHR: 'a device',
    stat.S_ISBLK: 'a device',
}
_repr = reprlib.Repr()
_repr.maxstring = _repr.maxother = _repr.maxlong = 60


def shown(value: object) -> str:
    """A value for a message, in one line and shortened."""
    return _repr.repr(value)


def irregular(mode: int) -> str | None:
    """What a file is that is no regular one, such as 'a pipe', whose reading would not end; None for a regular one."""
    return next((name for test, name in _KINDS.items() if test(mode)), None)


def read_json(path: str | os.PathLike, backend_args: dict | None = None) -> object:
    """Content of a JSON file in UTF-8, UTF-16 or UTF-32, with or without a byte order mark.

    Raises:
        DataError: if there is no such file, or it is not JSON; the message names the file and the place in it.
    """
    try:
        with get_local_path(str(path), backend_args=backend_args) as local_path:
            kind = irregular(os.stat(local_path).st_mode)
            if kind:
                raise DataError(f"annotation file '{path}' is {kind}: name a JSON file")
            with open(local_path, 'rb') as file:
                data = file.read()
    except FileNotFoundError:
        folder = os.path.dirname(path) or '.'
        what = 'its folder is missing too' if not os.path.isdir(folder) else f"'{folder}' is there"
        raise DataError(
            f"annotation file '{path}' does not exist ({what}): set data_root and the annotation files, for example "
            '--cfg-options data_root=... train_ann=... val_ann=...'
        ) from None
    except OSError as error:
        raise DataError(
            f"annotation file '{path}' cannot be read ({error.strerror or error}): check its permissions and the disk"
        ) from None
    return _parse(data, path)


def _parse(data: bytes, path: str | os.PathLike) -> object:
    packed = next((name for start, name in _ARCHIVES.items() if data.startswith(start)), None)
    if packed or not data.strip():
        state = f'is packed by {packed}: unpack it' if packed else 'is empty: export it again, in COCO format'
        raise DataError(f"annotation file '{path}' {state}")
    encoding, collects = json.detect_encoding(data), gc.isenabled()
    gc.disable()  # JSON has no cycles, and searching the growing content for them takes as long as reading it
    try:
        text = data.decode(encoding)
        del data  # a large file is in memory twice otherwise
        return json.loads(text, object_pairs_hook=_without_duplicates)
    except UnicodeDecodeError as error:
        raise DataError(f"annotation file '{path}' is not {encoding} ({error}): save it as UTF-8") from None
    except RecursionError:
        raise DataError(f"annotation file '{path}' is nested too deeply: export it in COCO format") from None
    except MemoryError:
        raise DataError(f"annotation file '{path}' does not fit into memory: split it") from None
    except ValueError as error:
        several = ' (one object per line?)' if 'Extra data' in str(error) else ''
        raise DataError(
            f"annotation file '{path}' is not JSON{several} ({error}): export it in COCO format, as one JSON object"
        ) from None
    finally:
        if collects:
            gc.enable()


def _without_duplicates(pairs: list[tuple[str, object]]) -> dict:
    content = dict(pairs)
    if len(content) < len(pairs):
        keys = [key for key, _ in pairs]
        twice = next(key for key in keys if keys.count(key) > 1)
        raise ValueError(f'one object has the key {shown(twice)} twice')
    return content
