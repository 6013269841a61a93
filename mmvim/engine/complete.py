"""What a config leaves open because it follows from the data: paths of a COCO folder and the number of classes."""

import os

from mmengine.config import ConfigDict

from mmvim.datasets.annotations import read_class_names
from mmvim.errors import ConfigError

LOADERS = dict(train_dataloader='train', val_dataloader='val', test_dataloader='test')


def complete_config(cfg: ConfigDict) -> ConfigDict:
    """Fill in what a config with :class:`mmvim.CocoFolderDataset` leaves out; other configs stay as they are.

    The top-level keys ``data_root``, ``train_ann``, ``val_ann``, ``test_ann``, ``train_img``, ``val_img``,
    ``test_img``, ``skip_bad_images`` go to the data sets that do not set them themselves; the test split is the
    validation split unless it is named. The class names come from ``classes`` or the training annotations, and their
    number goes to ``num_classes`` of every head.

    Args:
        cfg: the config, changed in place.

    Raises:
        ConfigError: if ``num_classes`` is given and is not the number of classes.
        DataError: if the annotation file cannot be read.
    """
    folders = [(key, dataset_of(cfg.get(key))) for key in LOADERS]
    folders = [(key, dataset) for key, dataset in folders if str(dataset.get('type')).endswith('CocoFolderDataset')]
    if not folders:
        return cfg
    for key, dataset in folders:
        _fill_paths(cfg, LOADERS[key], dataset)
    classes = cfg.get('classes') or _classes_of([dataset for _, dataset in folders])
    given = cfg.get('num_classes')
    if given is not None and given != len(classes):
        raise ConfigError(
            f'num_classes={given}, but the annotation file has {len(classes)} classes ({", ".join(classes)}): leave '
            'num_classes out, or use other annotations'
        )
    for _, dataset in folders:
        metainfo = dataset.setdefault('metainfo', ConfigDict())
        metainfo.setdefault('classes', tuple(classes))
    set_num_classes(cfg['model'], len(classes))
    return cfg


def dataset_of(loader: dict | None) -> dict:
    """Config of the innermost data set of a loader; empty if there is none."""
    dataset = (loader or {}).get('dataset') or {}
    while isinstance(dataset.get('dataset'), dict):
        dataset = dataset['dataset']
    return dataset


def _fill_paths(cfg: ConfigDict, split: str, dataset: dict) -> None:
    def value(name: str):
        return cfg.get(f'{split}_{name}') or (cfg.get(f'val_{name}') if split == 'test' else None)

    if cfg.get('data_root'):
        dataset.setdefault('data_root', cfg['data_root'])
    if value('ann'):
        dataset.setdefault('ann_file', value('ann'))
    if value('img') is not None:
        dataset.setdefault('data_prefix', dict(img=value('img')))
    if cfg.get('skip_bad_images') is not None:
        dataset.setdefault('skip_bad_images', cfg['skip_bad_images'])


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
        if isinstance(value, (dict, list)):
            set_num_classes(value, count)
