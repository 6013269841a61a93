"""What a config leaves open because it follows from the data: paths, classes and sizes for data of one's own."""

import os

from mmengine.config import ConfigDict

from mmvim.compat.types import kind_of
from mmvim.config.class_counts import set_num_classes
from mmvim.config.data import dataset_of
from mmvim.datasets.annotations import read_class_names
from mmvim.errors import ConfigError

LOADERS = dict(train_dataloader='train', val_dataloader='val', test_dataloader='test')
LONGEST = (1333, 800)  # longest and shortest side of MMDetection's usual frame
LONGEST_SEG = (4, 1)  # of MMSegmentation's
COMPLETED_KEYS = {
    'data_root', 'train_ann', 'val_ann', 'test_ann', 'train_img', 'val_img', 'test_img', 'skip_bad_images', 'classes',
    'num_classes', 'image_size', 'max_iters', 'ignore_index', 'reduce_zero_label', 'img_suffix', 'seg_map_suffix',
    'crop_size',
}  # fmt: skip
COCO_FOLDER, LABEL_MAPS = 'CocoFolderDataset', 'BaseSegDataset'


def complete_config(cfg: ConfigDict) -> set[str]:
    """Fill in what a config leaves open from its top-level keys, so that each is stated in one place.

    - ``data_root`` goes to the data sets;
    - ``train_ann``, ``val_ann``, ``test_ann``, ``train_img``, ``val_img`` and ``test_img`` go to
      :class:`mmvim.CocoFolderDataset` and to MMSegmentation's BaseSegDataset as annotation file or folder of label maps
      and as image folder; the test split is the validation split unless it is named. ``skip_bad_images`` goes to the
      first, ``img_suffix``, ``seg_map_suffix`` and ``reduce_zero_label`` go to the second;
    - ``classes``, or the names in the training annotations of a COCO folder, go to these data sets, and their number to
      ``num_classes`` of every head;
    - ``ignore_index`` goes to all that reads label maps: data sets, random crops, padding, heads and metric;
    - ``image_size`` goes to the transforms that resize and crop, and to the backbone's positions; for label maps crops
      and positions are of ``crop_size`` if it is given;
    - ``max_iters`` goes to the training loop, and is the end of the learning rate's schedule.

    What is set where it is used stays as it is.

    Args:
        cfg: the config, changed in place.

    Returns:
        The top-level keys that were used.

    Raises:
        ConfigError: if ``num_classes`` is given and is not the number of classes, or label maps have no class names.
        DataError: if the annotation file cannot be read.
    """
    used: set[str] = set()
    datasets = [(LOADERS[key], dataset_of(cfg.get(key))) for key in LOADERS if cfg.get(key)]
    for split, dataset in datasets:
        _fill(cfg, 'data_root', dataset, 'data_root', used)
        _fill_paths(cfg, split, dataset, used)
    folders = [dataset for _, dataset in datasets if kind_of(dataset) == COCO_FOLDER]
    label_maps = [dataset for _, dataset in datasets if kind_of(dataset) == LABEL_MAPS]
    if folders:
        _fill_classes(cfg, folders, _names(cfg) or _classes_of(folders), 'the annotation file has', used)
    if label_maps:
        _fill_label_maps(cfg, label_maps, used)
    _fill_image_size(cfg, [dataset for _, dataset in datasets], bool(label_maps), used)
    _fill_max_iters(cfg, used)
    return used


def completed_keys(cfg: ConfigDict, used: set[str]) -> set[str]:
    """Top-level keys that :func:`complete_config` reads: those it used, and those that say by None that they do not."""
    return used | {key for key in COMPLETED_KEYS if cfg.get(key) is None}


def _fill(cfg: ConfigDict, name: str, target: dict, key: str, used: set[str], value: object = None) -> None:
    """Set target[key] to a top-level value, or to what was made of it, where it is open."""
    if cfg.get(name) is not None and target.get(key) is None:
        target[key] = cfg[name] if value is None else value
        used.add(name)


def _fill_paths(cfg: ConfigDict, split: str, dataset: dict, used: set[str]) -> None:
    names = {suffix: f'{split}_{suffix}' for suffix in ('img', 'ann')}
    if split == 'test':
        names = {suffix: name if cfg.get(name) is not None else f'val_{suffix}' for suffix, name in names.items()}
    if kind_of(dataset) == COCO_FOLDER:
        _fill(cfg, names['ann'], dataset, 'ann_file', used)
        _fill(cfg, names['img'], dataset, 'data_prefix', used, dict(img=cfg.get(names['img'])))
        _fill(cfg, 'skip_bad_images', dataset, 'skip_bad_images', used)
    elif kind_of(dataset) == LABEL_MAPS:
        prefix = ConfigDict(dataset.get('data_prefix') or {})
        _fill(cfg, names['img'], prefix, 'img_path', used)
        _fill(cfg, names['ann'], prefix, 'seg_map_path', used)
        if prefix:
            dataset['data_prefix'] = prefix
        for key in ('img_suffix', 'seg_map_suffix', 'reduce_zero_label'):
            _fill(cfg, key, dataset, key, used)


def _steps(cfg: ConfigDict, datasets: list[dict]) -> list[dict]:
    """All transforms, also those of the top-level keys, which MMSegmentation's inference_model reads."""
    pipelines = [dataset.get('pipeline') for dataset in datasets]
    pipelines += [cfg.get(key) for key in ('train_pipeline', 'test_pipeline')]
    return [step for pipeline in pipelines for step in pipeline or []]


def _names(cfg: ConfigDict) -> tuple[str, ...]:
    """Class names that the config gives; one name alone comes from the command line as a string."""
    classes = cfg.get('classes') or ()
    return (classes,) if isinstance(classes, str) else tuple(classes)


def _has_classes(dataset: dict) -> bool:
    return (dataset.get('metainfo') or {}).get('classes') is not None


def _fill_classes(cfg: ConfigDict, datasets: list[dict], classes: tuple[str, ...], source: str, used: set[str]) -> None:
    given = cfg.get('num_classes')
    if given is not None and given != len(classes):
        raise ConfigError(
            f'num_classes={given}, but {source} {len(classes)} classes ({", ".join(classes)}): leave '
            'num_classes out, or use other annotations'
        )
    used.update(('classes', 'num_classes'))
    for dataset in datasets:
        if not _has_classes(dataset):
            dataset['metainfo'] = ConfigDict(dataset.get('metainfo') or {}, classes=classes)
    set_num_classes(cfg['model'], len(classes))


def _fill_label_maps(cfg: ConfigDict, datasets: list[dict], used: set[str]) -> None:
    """Class names and the value to ignore, of data sets that read a folder of label maps."""
    if not all(_has_classes(dataset) for dataset in datasets):
        classes = _names(cfg)
        if not classes:
            raise ConfigError(
                'no class names: label maps have none of their own, so name their values 0, 1, ... in this order, in '
                'the config or by --cfg-options classes="[road,sky]"'
            )
        _fill_classes(cfg, datasets, classes, 'classes names', used)
    heads = [cfg['model'].get(key) or [] for key in ('decode_head', 'auxiliary_head')]
    crops = [step for step in _steps(cfg, datasets) if kind_of(step) == 'RandomCrop']
    evaluators = [cfg.get(key) or [] for key in ('val_evaluator', 'test_evaluator')]
    for part in [*_flat(heads), *datasets, *crops, *(e for e in _flat(evaluators) if kind_of(e) == 'IoUMetric')]:
        _fill(cfg, 'ignore_index', part, 'ignore_index', used)
    _fill(cfg, 'ignore_index', cfg['model'].get('data_preprocessor') or {}, 'seg_pad_val', used)


def _flat(parts: list[dict | list[dict]]) -> list[dict]:
    return [part for entry in parts for part in (entry if isinstance(entry, list) else [entry])]


def _classes_of(datasets: list[dict]) -> tuple[str, ...]:
    """Class names of the first split, training before validation, whose annotation file is there."""
    paths = [os.path.join(dataset.get('data_root') or '', dataset.get('ann_file') or '') for dataset in datasets]
    there = [path for path in paths if os.path.isfile(path)]
    return read_class_names((there or paths)[0])


def _fill_image_size(cfg: ConfigDict, datasets: list[dict], label_maps: bool, used: set[str]) -> None:
    frame, crop, positions = _sizes(cfg, label_maps)
    if frame is None:
        return
    values = dict(scale=('image_size', frame), crop_size=('crop_size' if cfg.get('crop_size') else 'image_size', crop))
    places = [
        (step, dict(RandomResize='scale', Resize='scale', RandomCrop='crop_size').get(kind_of(step)))
        for step in _steps(cfg, datasets)
        if step.get('scale_factor') is None
    ]
    for step, key in places:
        if key:
            _fill(cfg, values[key][0], step, key, used, values[key][1])
    backbone = cfg['model'].get('backbone') or {}
    if 'img_size' in backbone:
        _fill(cfg, values['crop_size'][0], backbone, 'img_size', used, positions)
    if label_maps and 'data_preprocessor' in cfg['model']:
        _fill(cfg, values['crop_size'][0], cfg['model']['data_preprocessor'], 'size', used, crop)


def _sizes(cfg: ConfigDict, label_maps: bool) -> tuple[tuple[int, int] | None, tuple[int, int], tuple[int, int]]:
    """Frame (width, height) of the images, size (height, width) of crops, and of the map of positions, pixels."""
    size, crop = cfg.get('image_size'), cfg.get('crop_size')
    if isinstance(size, int) and not label_maps:
        frame = (size * LONGEST[0] // LONGEST[1], size)
        return frame, (frame[0], frame[0]), (size, size)
    if not label_maps or not size:
        return None, (0, 0), (0, 0)
    frame = (size * LONGEST_SEG[0], size) if isinstance(size, int) else tuple(size)
    crop = crop or (size if isinstance(size, int) else frame[::-1])
    crop = (crop, crop) if isinstance(crop, int) else tuple(crop)
    return frame, crop, crop


def _fill_max_iters(cfg: ConfigDict, used: set[str]) -> None:
    if kind_of(cfg.get('train_cfg') or {}) == 'IterBasedTrainLoop':
        _fill(cfg, 'max_iters', cfg['train_cfg'], 'max_iters', used)
    schedules = cfg.get('param_scheduler')
    if isinstance(schedules, list) and schedules and not {'milestones', 'T_max'} & set(schedules[-1]):
        _fill(cfg, 'max_iters', schedules[-1], 'end', used)
