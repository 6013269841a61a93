"""Which checkpoint a run goes on from: the newest of its work directory that can be read and fits."""

import math
import os
from collections.abc import Callable, Iterable, Mapping
from pathlib import Path
from typing import Any, NamedTuple

from mmvim.errors import CheckpointError, first_line
from mmvim.weights.reading import check_intact, read_checkpoint

SUFFIXES = ('.pth', '.pt', '.ckpt')
REMEDY = 'start from its weights with load_from=FILE in place of --resume'


def checkpoints_in(folder: str | os.PathLike) -> list[Path]:
    """The files in a folder that have the name of a checkpoint."""
    return sorted(file for file in Path(folder).glob('*') if file.suffix in SUFFIXES)


class Found(NamedTuple):
    """A checkpoint that can be read, and what it holds but for the numbers in its tensors."""

    path: Path
    content: Mapping[str, Any]

    @classmethod
    def read(cls, path: str | os.PathLike) -> 'Found':
        """What a file holds, without reading its tensors.

        Raises:
            CheckpointError: if it cannot be read, or is no dict with a dict as `meta`.
        """
        content = read_checkpoint(path, map_location='cpu' if Path(path).suffix == '.safetensors' else 'meta')
        meta = content.get('meta', {}) if isinstance(content, Mapping) else None
        if not isinstance(meta, Mapping):
            raise CheckpointError(f"'{path}' holds no checkpoint of a training run: give another file")
        return cls(Path(path), content)

    @property
    def age(self) -> tuple[float, float, bool, float]:
        """Sorts checkpoints: the newest is the largest, and what does not say how new it is comes before it."""
        meta = self.content.get('meta', {})
        iteration, epoch = (value if isinstance(value := meta.get(key), int) else math.inf for key in ('iter', 'epoch'))
        return iteration, epoch, 'optimizer' in self.content, self.path.stat().st_mtime


def newest_checkpoint(
    folders: Iterable[str | os.PathLike], wanted: Callable[[Found], None], purpose: str = '--resume'
) -> tuple[Found | None, list[str]]:
    """The newest checkpoint in some folders, counted by the iteration that it was saved at.

    A file named in `last_checkpoint` counts if it lies elsewhere and none lies in the folders.

    Args:
        folders: where to look.
        wanted: raises CheckpointError for one that cannot be used.
        purpose: begins the message of an error.

    Returns:
        The checkpoint, None if there is none at all; and one line on each that was skipped.

    Raises:
        CheckpointError: if there are checkpoints, or `last_checkpoint` names one, but none can be used.
    """
    folders = list(dict.fromkeys(Path(folder) for folder in folders))
    files = [file for folder in folders for file in checkpoints_in(folder)]
    noted = next((path for folder in folders if (path := _noted(folder)) is not None), None)
    if not files and noted is not None:
        if not noted.is_file():
            raise CheckpointError(
                f"{purpose}: '{folders[0] / 'last_checkpoint'}' names '{noted}', which does not exist, and no "
                f'checkpoint lies beside it: give the path of one, or delete last_checkpoint to start anew'
            )
        files = [noted]
    readable, skipped = [], []
    for file in files:
        try:
            readable.append(Found.read(file))
        except CheckpointError as error:
            skipped.append(_short(error))
    for found in sorted(readable, key=lambda found: found.age, reverse=True):
        try:
            wanted(found)
            check_intact(found.path)
            return found, skipped
        except CheckpointError as error:
            skipped.append(_short(error))
    if not files:
        return None, []
    more = f'; and {len(skipped) - 3} more' if len(skipped) > 3 else ''
    raise CheckpointError(
        f"{purpose}: none of the {len(files)} checkpoints in '{folders[0]}' can be used: {'; '.join(skipped[:3])}{more}"
        '. Move them away to start anew, or give the path of another one'
    )


def check_weights(found: Found) -> None:
    """Refuse a file that is none of a run, such as one that was published.

    Raises:
        CheckpointError: if it does not say when it was saved, or holds no weights.
    """
    check_resumable(found.path, {'optimizer': {}, **found.content}, with_schedulers=False)


def _noted(folder: Path) -> Path | None:
    """The file that `last_checkpoint` names, if it names one."""
    try:
        text = (folder / 'last_checkpoint').read_text().strip('\0 \n')
    except (OSError, UnicodeDecodeError):
        return None
    return Path(text) if text and text != '.' else None


def _short(error: CheckpointError) -> str:
    """A message without its remedy, which is another one here."""
    return first_line(error).rpartition(': ')[0] or first_line(error)


def check_resumable(path: str | os.PathLike, content: Mapping[str, Any], with_schedulers: bool) -> None:
    """Refuse a checkpoint that lacks something of a training run.

    Args:
        path: the file, for the message.
        content: what it holds.
        with_schedulers: whether the run schedules its learning rate.

    Raises:
        CheckpointError: if it was not saved by a run, or without what a resumed run needs.
    """
    meta = content.get('meta')
    if not isinstance(meta, Mapping) or not all(isinstance(meta.get(key), int) for key in ('iter', 'epoch')):
        raise CheckpointError(
            f"'{path}' cannot be resumed from, as it does not say at which iteration and epoch it was saved: {REMEDY}"
        )
    if not isinstance(meta.get('seed', 0), int) or not isinstance(content.get('message_hub', {}), Mapping):
        raise CheckpointError(f"'{path}' cannot be resumed from, as its seed or message_hub is none: {REMEDY}")
    kinds: dict[str, tuple[Any, str]] = dict(
        state_dict=(Mapping, 'weights'), optimizer=(Mapping, 'state of the optimiser')
    )
    if with_schedulers:
        kinds['param_schedulers'] = (list | dict, 'state of the parameter schedulers')
    for key, (kind, what) in kinds.items():
        if not isinstance(content.get(key), kind):
            have = 'no' if content.get(key) is None else f'a {type(content[key]).__name__} for'
            raise CheckpointError(f"'{path}' cannot be resumed from, as it has {have} {what} ('{key}'): {REMEDY}")
    for key, parts in (
        ('param_groups', content['optimizer'].get('param_groups', [])),
        ('param_schedulers', content.get('param_schedulers', [])),
    ):
        if isinstance(parts, list) and all(isinstance(part, Mapping) for part in parts):
            continue
        if key == 'param_groups' or not isinstance(parts, Mapping):  # of several optimisers, by name
            raise CheckpointError(f"'{path}' cannot be resumed from, as its {key} are no list of dicts: {REMEDY}")
