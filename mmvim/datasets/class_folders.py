"""A folder of images per class, as it lies on the disk."""

import os
from collections.abc import Iterator
from pathlib import Path

from mmvim.datasets.image_files import IMAGES
from mmvim.errors import DataError

SYSTEM = {'__MACOSX', '@eaDir', '$RECYCLE.BIN', 'System Volume Information', 'lost+found'}  # no classes
SPLITS = {'train', 'training', 'val', 'valid', 'validation', 'test', 'testing'}


def class_folders(root: str) -> tuple[str, ...]:
    """Names of the class folders in a folder, sorted; hidden folders and those of systems are none.

    Raises:
        DataError: if there are none, or they are the splits of a data set.
    """
    if not os.path.isdir(root):
        raise DataError(
            f"image folder '{root}' does not exist: set data_root, and train_img and val_img to the folders below it "
            'that hold a folder of images per class'
        )
    with os.scandir(root) as entries:
        visible = [entry for entry in entries if not entry.name.startswith('.') and entry.name not in SYSTEM]
        names = tuple(sorted(entry.name for entry in visible if entry.is_dir()))
    if not names:
        images = sum(entry.name.lower().endswith(IMAGES) for entry in visible)
        raise DataError(
            f"image folder '{root}' holds {images} images and no class folders: put the images of each class into a "
            f"folder of its name, such as '{os.path.join(root, 'daisy', '1.jpg')}'"
        )
    if SPLITS.issuperset(name.lower() for name in names):
        raise DataError(
            f"image folder '{root}' holds the folders {', '.join(names)}, which are splits and not classes: set "
            f'train_img and val_img to them'
        )
    return names


def files_below(folder: str | Path) -> Iterator[Path]:
    """All files below a folder, without hidden ones and those in hidden folders, sorted; links are followed once."""
    seen = set()
    for parent, folders, names in os.walk(str(folder), followlinks=True):
        real = os.path.realpath(parent)
        folders[:] = [] if real in seen else sorted(name for name in folders if not name.startswith('.'))
        if real not in seen:
            seen.add(real)
            yield from (Path(parent, name) for name in sorted(names) if not name.startswith('.'))
