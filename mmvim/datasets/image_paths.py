"""Files that an annotation file names: below the image folder, and regular ones."""

import os
import stat
from collections.abc import Sequence
from functools import lru_cache

from mmvim.datasets.json_files import irregular
from mmvim.errors import DataError


def check_paths(paths: Sequence[str], folder: str, ann_file: str, outside: bool, skip: bool) -> list[str]:
    """Check where images are, and that reading them will end.

    Args:
        paths: of the images.
        folder: the image folder.
        ann_file: the annotation file, for messages.
        outside: whether they may be outside the folder.
        skip: whether those that are no regular files are left to the reader, which refuses them one by one.

    Returns:
        Those that do not exist.

    Raises:
        DataError: if one leaves the folder, or is no regular file.
    """
    home = os.path.realpath(folder)
    real_folder = lru_cache(os.path.realpath)
    missing = []
    for path in paths:
        try:
            mode = os.lstat(path).st_mode
            real = os.path.realpath(path) if stat.S_ISLNK(mode) else _in(real_folder(os.path.dirname(path)), path)
            mode = os.stat(path).st_mode if stat.S_ISLNK(mode) else mode
        except (OSError, ValueError):
            missing.append(path)
            real, mode = os.path.realpath(path), stat.S_IFREG
        if not outside and os.path.commonpath((home, real)) != home:
            raise DataError(
                f"annotation file '{ann_file}' names the image '{path}', which is '{real}', outside the image folder "
                f"'{folder}': correct file_name, or set images_outside=True if you trust the file"
            )
        if not skip and (kind := irregular(mode)):
            raise DataError(f"image '{path}' of '{ann_file}' is {kind}: correct its file_name, or remove it")
    return missing


def _in(folder: str, path: str) -> str:
    return os.path.join(folder, os.path.basename(path))
