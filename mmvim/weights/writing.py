"""Write checkpoint files so that a process killed at any moment leaves the old or the new one, and complete."""

import os
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import IO, Any

import torch

UNFINISHED = '.unfinished'  # the last suffix of a file that is being written


@contextmanager
def replacing(path: str | os.PathLike) -> Iterator[IO[bytes]]:
    """A file to write to, which takes the place of `path` once it is complete and on the disk.

    Args:
        path: the file to replace or create; its folder is created where it is missing.

    Yields:
        The file, open for writing bytes. If writing fails, it is removed and `path` stays as it was.
    """
    path = Path(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    unfinished = path.with_name(f'{path.name}.{os.getpid()}{UNFINISHED}')
    try:
        with unfinished.open('wb') as file:
            yield file
            file.flush()
            os.fsync(file.fileno())
        os.replace(unfinished, path)
    except BaseException:
        unfinished.unlink(missing_ok=True)
        raise
    _sync_folder(path.parent)


def _sync_folder(folder: Path) -> None:
    """Put the names in a folder on the disk, where the system can do that."""
    try:
        descriptor = os.open(folder, os.O_RDONLY)
    except OSError:  # Windows opens no folders
        return
    try:
        os.fsync(descriptor)
    except OSError:  # some network file systems refuse
        pass
    finally:
        os.close(descriptor)


def save_atomically(checkpoint: Any, path: str | os.PathLike) -> None:
    """`torch.save` to a local file that is never seen incomplete. All checkpoints of a run are written here."""
    with replacing(path) as file:
        torch.save(checkpoint, file)


def remove_unfinished(folder: str | os.PathLike) -> list[str]:
    """Delete the files that killed processes left half-written in a folder; returns their names."""
    left = sorted(Path(folder).glob(f'*{UNFINISHED}'))
    for file in left:
        file.unlink(missing_ok=True)
    return [file.name for file in left]
