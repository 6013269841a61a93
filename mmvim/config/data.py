"""Data sets in a config: the innermost one of a loader, and why one is missing or has no images."""

import inspect
import os
from collections import Counter
from collections.abc import Iterator

from mmvim.compat.types import dataset_class, kind_of
from mmvim.errors import DataError

NUMPY_MESSAGE = 'need at least one array to concatenate'  # all that mmengine's BaseDataset says of an empty one


def dataset_of(loader: dict | None) -> dict:
    """Config of the innermost data set of a loader; empty if there is none."""
    dataset = (loader or {}).get('dataset') or {}
    while isinstance(dataset.get('dataset'), dict):
        dataset = dataset['dataset']
    return dataset


def layers(dataset: dict) -> Iterator[dict]:
    """Configs of a data set and of those in it; each may have a pipeline."""
    yield dataset
    for part in _inner(dataset):
        yield from layers(part)


def _inner(dataset: dict) -> list[dict]:
    joined = dataset.get('datasets') or ([dataset['dataset']] if dataset.get('dataset') else [])
    return [part for part in joined if isinstance(part, dict)]


def check_one_metainfo(dataset: object) -> None:
    """Refuse joined data sets whose labels mean different classes; MMDetection's ConcatDataset only lists them.

    Raises:
        DataError: naming the classes.
    """
    metainfo = getattr(dataset, 'metainfo', None)
    inner = getattr(dataset, 'dataset', None)
    if not isinstance(metainfo, list):
        return check_one_metainfo(inner) if inner is not None else None
    classes = [tuple(part.get('classes') or ()) for part in metainfo]
    if len(set(classes)) > 1:
        other = next(names for names in classes if names != classes[0])
        raise DataError(
            f'joined data sets have different classes, {list(classes[0])} and {list(other)}, so that a label has two '
            'meanings: give all the same names in the same order as metainfo=dict(classes=...), or leave them out for '
            'mmvim.CocoFolderDataset, which then has those of all files'
        )
    return None


def check_data_root(dataset: dict) -> None:
    """Refuse a data set whose folder is missing, unless it makes or downloads it itself.

    Raises:
        DataError: naming the folder.
    """
    root = dataset.get('data_root')
    if not root or '://' in str(root) or os.path.isdir(root):
        return
    known = dataset_class(dataset)
    ours = any(base.__module__.startswith('mmvim.') for base in getattr(known, '__mro__', ()))  # generate or check it
    if not ours and (known is None or 'download' not in inspect.signature(known).parameters):
        raise DataError(
            f"data folder '{root}' of {kind_of(dataset)} does not exist: put the data there, or name another folder "
            'with --cfg-options train_dataloader.dataset.data_root=... (likewise val_dataloader and test_dataloader)'
        )


def explain_empty(dataset: dict) -> str:
    """One line that names the folder, the suffix and the files there, or the annotation file, and the remedy.

    Args:
        dataset: config of the data set, which may hold others, that ended in `NUMPY_MESSAGE`.
    """
    found = [_explain_folder(part) for part in parts(dataset) if not part.get('ann_file')]
    known = [message for message in found if message]
    if known:
        return known[0]
    named = ', '.join(
        f'{kind_of(part)} of {part.get("ann_file") or part.get("data_prefix") or part.get("data_root")!r}'
        for part in parts(dataset)
    )
    return (
        f'no image is left in a data set ({named}): check ann_file, data_prefix, the class names in metainfo, and '
        'filter_cfg, which may leave out all images'
    )


def parts(dataset: dict) -> Iterator[dict]:
    """Configs of the data sets without those that only join or repeat others."""
    inner = _inner(dataset)
    if not inner:
        yield dataset
    for part in inner:
        yield from parts(part)


def _explain_folder(dataset: dict) -> str | None:
    """What is wrong with a folder that MMSegmentation searches for images; None if it is none, or nothing is."""
    suffix = dataset.get('img_suffix') or _default(dataset, 'img_suffix')
    folder = os.path.join(dataset.get('data_root') or '', (dataset.get('data_prefix') or {}).get('img_path') or '')
    if suffix is None or not os.path.isdir(folder):
        return None
    files = [name for _, _, names in os.walk(folder) for name in names]
    if any(name.endswith(suffix) for name in files):
        return None
    if not files:
        return f"image folder '{folder}' of {kind_of(dataset)} holds no files: name another one in data_prefix.img_path"
    kinds = Counter(os.path.splitext(name)[1] or name for name in files).most_common(3)
    shown = ', '.join(f"{count} '{kind}'" for kind, count in kinds)
    return (
        f"image folder '{folder}' of {kind_of(dataset)} holds {len(files)} files ({shown}), none of which ends in "
        f'img_suffix={suffix!r}: set img_suffix, and seg_map_suffix for the label maps, or name another folder in '
        'data_prefix.img_path'
    )


def _default(dataset: dict, argument: str) -> object:
    """Default of an argument of the class or of those that it hands arguments on to; None if there is none."""
    for cls in getattr(dataset_class(dataset), '__mro__', ()):
        parameter = inspect.signature(cls.__init__).parameters.get(argument)
        if parameter is not None and parameter.default is not parameter.empty:
            return parameter.default
    return None
