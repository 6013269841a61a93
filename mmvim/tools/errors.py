"""Errors that the input caused, in one line."""

import difflib
import re
import traceback

from mmengine.registry import root

from mmvim.compat import explain_transformers
from mmvim.errors import InputError, first_line
from mmvim.tools.system_errors import explain_system

WORKER = re.compile(r'Caught \w+ in .*\nOriginal Traceback')
FRAME = re.compile(r'  File ".*", line \d+')


def explain(error: Exception) -> str | None:
    """One line for an error that the user's input caused; None for all others, which keep their stack trace."""
    text = str(error)
    in_worker = WORKER.match(text)
    if isinstance(error, InputError):
        # A data loader's worker puts the whole stack trace into the message.
        return text.rstrip().rsplit(f'{type(error).__name__}: ', 1)[-1] if in_worker else text
    of_system = explain_system(error)
    if of_system:
        return of_system
    if in_worker and not _differs_in_size(text):
        return (
            f'loading data fails in a worker process ({_last_line(text)}): check the files and the pipeline; '
            'train_dataloader.num_workers=0 (likewise val_dataloader, test_dataloader) and MMVIM_TRACEBACK=1 show where'
        )
    if isinstance(error, FileExistsError | FileNotFoundError | PermissionError | IsADirectoryError):
        return f"{error.strerror}: '{error.filename}'; check the paths in the config" if error.filename else text
    if type(error).__name__ == 'OutOfMemoryError':
        return 'out of GPU memory: lower train_dataloader.batch_size, set model.backbone.with_cp=True, or use --amp'
    if _differs_in_size(text):
        return (
            'the images of a batch differ in size; MMSegmentation accepts that in training only, MMPretrain never: '
            'resize or crop them to one size in the pipeline, or set batch_size=1 in the data loader'
        )
    if 'DataLoader worker' in text and ('exited unexpectedly' in text or 'killed by signal' in text):
        return (
            f'{first_line(error).rstrip(".")}: memory, or shared memory (/dev/shm), may have run out; lower '
            'num_workers and batch_size of the data loaders'
        )
    of_transformers = explain_transformers(error)
    if of_transformers:
        return of_transformers
    frames = [frame for frame in traceback.extract_tb(error.__traceback__) if 'build_functions' in frame.filename]
    if not frames:
        return None
    if text.startswith('Failed to get ') or 'is not in the' in text:
        name = text.removeprefix('Failed to get ').split(' is not in')[0].strip('\'"')
        return f"the config names type '{name}', which no registry has: check its spelling and its scope{_close(name)}"
    if isinstance(error, TypeError) and ('() ' in text or text.startswith('cfg should be')):  # a call's signature
        return f'wrong config key: {text}'
    if isinstance(error, ValueError | AssertionError) and text:
        return f'wrong value in the config: {text}'
    return None


def _differs_in_size(text: str) -> bool:
    return 'image size in a batch should be the same' in text or 'stack expects each tensor to be equal size' in text


def _last_line(text: str) -> str:
    """Type and message of the error at the end of a worker's stack trace, whose own lines are indented."""
    lines = text.rstrip().splitlines()
    last = max((i for i, line in enumerate(lines) if FRAME.match(line)), default=-1)
    while last + 1 < len(lines) and lines[last + 1].startswith(' '):
        last += 1
    return ' '.join(' '.join(lines[last + 1 :]).split())[:300]


def _close(name: str) -> str:
    scope, _, plain = name.rpartition('.')
    known = []
    for registry in vars(root).values():
        for child in [registry, *getattr(registry, '_children', {}).values()]:
            if getattr(child, 'scope', None) in (scope or 'mmdet', 'mmdet', 'mmvim'):
                known += [f'{child.scope}.{key}' for key in getattr(child, '_module_dict', {})]
    close = difflib.get_close_matches(plain, [key.split('.')[-1] for key in known], n=1)
    full = next((key for key in known if close and key.split('.')[-1] == close[0]), None)
    return f'; did you mean {full}?' if full else ''
