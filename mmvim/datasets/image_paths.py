"""Files that an annotation file names: below the image folder, and regular ones."""

import os
from collections.abc import Sequence
from pathlib import Path

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
        DataError: if the name of one leaves the folder, or one is no regular file.
    """
    homes = {os.path.abspath(folder), os.path.realpath(folder)}
    missing = []
    for path in paths:
        # a link in the folder is its owner's, but not what `..` makes of it
        climbs = '..' in Path(path.removeprefix(folder)).parts
        target = os.path.realpath(path) if climbs and '\0' not in path else os.path.abspath(path)
        if not outside and not any(os.path.commonpath((one, target)) == one for one in homes):
            raise DataError(
                f"annotation file '{ann_file}' names the image '{path}', which is '{target}', outside the image folder "
                f"'{folder}': correct file_name, or set images_outside=True if you trust the file"
            )
        try:
            mode = os.stat(path).st_mode
        except (OSError, ValueError):
            missing.append(path)
            continue
        if not skip and (kind := irregular(mode)):
            raise DataError(f"image '{path}' of '{ann_file}' is {kind}: correct its file_name, or remove it")
    return missing
