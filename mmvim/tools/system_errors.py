"""Errors of disks, folders and connections, in one line."""

import errno
import io
import os
from pathlib import Path
from types import TracebackType

ROOM = 'free some space or choose a --work-dir on another disk, then continue with --resume'
FOLDER = 'choose another --work-dir'
REMEDIES = {
    errno.ENOSPC: ROOM,
    errno.EDQUOT: ROOM,
    errno.EFBIG: f'raise the limit of file sizes (ulimit -f), or {ROOM}',
    errno.EIO: f'the disk may be damaged; {FOLDER}',
    errno.ESTALE: f'the network drive has gone; {FOLDER}',
    errno.EROFS: FOLDER,
    errno.ENAMETOOLONG: f'{FOLDER} with a shorter path',
    errno.ENOTDIR: f'a file stands where a folder is needed; remove it, or {FOLDER}',
    errno.EEXIST: f'a file stands where a folder is needed; remove it, or {FOLDER}',
    errno.EMFILE: 'raise the limit of open files (ulimit -n), or lower num_workers of the data loaders',
    errno.ENOMEM: 'lower num_workers or batch_size of the data loaders',
}
UNWRITTEN = ('PytorchStreamWriter failed', 'unexpected pos ')  # what torch.save says of a full disk
LOST = (
    'Connection reset by peer', 'Connection closed by peer', 'Broken pipe', 'ncclRemoteError', 'operation to complete',
)  # fmt: skip


def explain_system(error: Exception) -> str | None:
    """One line for an error of a disk, a folder or a lost process; None for all others."""
    if isinstance(error, RuntimeError) and any(text in str(error) for text in LOST):
        return (
            'the connection to another process of this run has broken: look above for its own error, or whether the '
            'system killed it for lack of memory; then continue from the last checkpoint with --resume'
        )
    if isinstance(error, RuntimeError) and any(text in str(error) for text in UNWRITTEN):
        return f'a checkpoint could not be written: {ROOM}'
    if isinstance(error, FileNotFoundError) and error.filename and not Path(error.filename).parent.is_dir():
        return (
            f"{error.strerror}: '{error.filename}', nor its folder; check the paths in the config, and that nobody "
            'removed the work directory during the run'
        )
    if not isinstance(error, OSError) or error.errno not in REMEDIES:
        return None
    file = str(error.filename or _open_file(error.__traceback__) or '')
    shown = file if len(file) < 200 else f'{file[:100]}...'
    return f'{os.strerror(error.errno)}{f": {shown!r}" if shown else ""}; {REMEDIES[error.errno]}'


def _open_file(traceback: TracebackType | None) -> str | None:
    """Name of the file that was open for writing where an error arose, which the error of a write does not say."""
    found = None
    while traceback is not None:
        for value in traceback.tb_frame.f_locals.values():
            name = getattr(value, 'name', None)
            if isinstance(value, io.IOBase) and isinstance(name, str):
                found = name
        traceback = traceback.tb_next
    return found
