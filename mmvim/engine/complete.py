"""What a config leaves open because it follows from the data: paths of a COCO folder and the number of classes."""

import inspect
import os

from mmengine.config import ConfigDict
from mmengine.registry import DATASETS

from mmvim.datasets.annotations import read_class_names
from mmvim.errors import ConfigError, DataError

LOADERS = dict(train_dataloader='train', val_dataloader='val', test_dataloader='test')
LONGEST = (1333, 800)  # longest and shortest side of MMDetection's usual frame


def complete_config(cfg: ConfigDict) -> set[str]:
    """Fill in what a config leaves open from its top-level keys, so that each is stated in one place.

    - ``data_root`` goes to the data sets, and to :class:`mmvim.CocoFolderDataset` also ``train_ann``, ``val_ann``,
      ``test_ann``, ``train_img``, ``val_img``, ``test_img`` and ``skip_bad_images``; the test split is the validation
      split unless it is named;
    - ``classes``, or the names in the training annotations of a COCO folder, go to its data sets, and their number to
      ``num_classes`` of every head;
    - ``image_size`` goes to the transforms that resize and crop, and to the backbone's positions;
    - ``max_iters`` goes to the training loop, and is the end of the learning rate's schedule.

    What is set where it is used stays as it is.

    Args:
        cfg: the config, changed in place.

    Returns:
        The top-level keys that were used.

    Raises:
        ConfigError: if ``num_classes`` is given and is not the number of classes.
        DataError: if the annotation file cannot be read.
    """
    used: set[str] = set()
    datasets = [(LOADERS[key], dataset_of(cfg.get(key))) for key in LOADERS if cfg.get(key)]
    folders = [(split, dataset) for split, dataset in datasets if _kind(dataset) == 'CocoFolderDataset']
    for _, dataset in datasets:
        _fill(cfg, 'data_root', dataset, 'data_root', used)
    for split, dataset in folders:
        _fill_paths(cfg, split, dataset, used)
    if folders:
        _fill_classes(cfg, [dataset for _, dataset in folders], used)
    _fill_image_size(cfg, [dataset for _, dataset in datasets], used)
    _fill_max_iters(cfg, used)
    return used


def dataset_of(loader: dict | None) -> dict:
    """Config of the innermost data set of a loader; empty if there is none."""
    dataset = (loader or {}).get('dataset') or {}
    while isinstance(dataset.get('dataset'), dict):
        dataset = dataset['dataset']
    return dataset


def check_data_root(dataset: dict) -> None:
    """Refuse a data set whose folder is missing, unless it makes or downloads it itself.

    Raises:
        DataError: naming the folder.
    """
    root = dataset.get('data_root')
    ours = ('ShapesDataset', 'ShapesSegDataset', 'CocoFolderDataset')  # generated, or checked by the data set itself
    if not root or '://' in str(root) or os.path.isdir(root) or _kind(dataset) in ours:
        return
    known = DATASETS.get(dataset['type']) if isinstance(dataset.get('type'), str) else dataset.get('type')
    if known is None or 'download' not in inspect.signature(known).parameters:
        raise DataError(
            f"data folder '{root}' of {_kind(dataset)} does not exist: put the data there, or name another folder "
            'with --cfg-options train_dataloader.dataset.data_root=... (likewise val_dataloader and test_dataloader)'
        )


def _kind(cfg: dict) -> str:
    return str(cfg.get('type')).split('.')[-1]


def _fill(cfg: ConfigDict, name: str, target: dict, key: str, used: set[str], value: object = None) -> None:
    """Set target[key] to a top-level value, or to what was made of it, where it is open."""
    if cfg.get(name) is not None and target.get(key) is None:
        target[key] = cfg[name] if value is None else value
        used.add(name)


def _fill_paths(cfg: ConfigDict, split: str, dataset: dict, used: set[str]) -> None:
    for suffix, key in (('ann', 'ann_file'), ('img', 'data_prefix')):
        name = f'{split}_{suffix}'
        if split == 'test' and cfg.get(name) is None:
            name = f'val_{suffix}'
        _fill(cfg, name, dataset, key, used, dict(img=cfg.get(name)) if suffix == 'img' else None)
    _fill(cfg, 'skip_bad_images', dataset, 'skip_bad_images', used)


def _fill_classes(cfg: ConfigDict, datasets: list[dict], used: set[str]) -> None:
    classes = tuple(cfg.get('classes') or _classes_of(datasets))
    given = cfg.get('num_classes')
    if given is not None and given != len(classes):
        raise ConfigError(
            f'num_classes={given}, but the annotation file has {len(classes)} classes ({", ".join(classes)}): leave '
            'num_classes out, or use other annotations'
        )
    used.update(('classes', 'num_classes'))
    for dataset in datasets:
        if dataset.get('metainfo') is None:
            dataset['metainfo'] = ConfigDict(classes=classes)
    set_num_classes(cfg['model'], len(classes))


def _classes_of(datasets: list[dict]) -> tuple[str, ...]:
    """Class names of the first split, training before validation, whose annotation file is there."""
    paths = [os.path.join(dataset.get('data_root') or '', dataset.get('ann_file') or '') for dataset in datasets]
    there = [path for path in paths if os.path.isfile(path)]
    return read_class_names((there or paths)[0])


def set_num_classes(model: dict | list, count: int) -> None:
    """Set ``num_classes`` wherever a model config has it outside backbone and RPN."""
    if isinstance(model, dict):
        if 'num_classes' in model:
            model['num_classes'] = count
        model = [value for key, value in model.items() if key not in ('backbone', 'rpn_head')]
    for value in model:
        if isinstance(value, dict | list):
            set_num_classes(value, count)


def _fill_image_size(cfg: ConfigDict, datasets: list[dict], used: set[str]) -> None:
    if not cfg.get('image_size') or not isinstance(cfg['image_size'], int):
        return
    size = cfg['image_size']
    frame = (size * LONGEST[0] // LONGEST[1], size)
    places = [
        (step, dict(RandomResize='scale', Resize='scale', RandomCrop='crop_size').get(_kind(step)))
        for dataset in datasets
        for step in dataset.get('pipeline') or []
        if step.get('scale_factor') is None
    ]
    for step, key in places:
        if key:
            _fill(cfg, 'image_size', step, key, used, frame if key == 'scale' else (frame[0], frame[0]))
    backbone = cfg['model'].get('backbone') or {}
    if 'img_size' in backbone:
        _fill(cfg, 'image_size', backbone, 'img_size', used, (size, size))


def _fill_max_iters(cfg: ConfigDict, used: set[str]) -> None:
    if _kind(cfg.get('train_cfg') or {}) == 'IterBasedTrainLoop':
        _fill(cfg, 'max_iters', cfg['train_cfg'], 'max_iters', used)
    schedules = cfg.get('param_scheduler')
    if isinstance(schedules, list) and schedules and not {'milestones', 'T_max'} & set(schedules[-1]):
        _fill(cfg, 'max_iters', schedules[-1], 'end', used)
