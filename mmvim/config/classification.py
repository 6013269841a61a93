"""What a classifier's config leaves open because it follows from its folders, and counts that must agree."""

import os
from collections.abc import Iterable

from mmengine.config import Config, ConfigDict

from mmvim.compat.types import kind_of
from mmvim.config.class_counts import set_num_classes
from mmvim.config.files import config_files
from mmvim.datasets.class_folders import class_folders
from mmvim.errors import ConfigError

EDGE = 256 / 224  # shorter side of a test image for each pixel of its central crop, as on ImageNet


def complete_class_folders(cfg: ConfigDict, datasets: list[dict]) -> set[str]:
    """Fill in class names, their number and the image size for :class:`mmvim.ClassFolderDataset`.

    Args:
        cfg: the config, changed in place.
        datasets: configs of these data sets, training first.

    Returns:
        The top-level keys that were read.

    Raises:
        ConfigError: if ``num_classes`` is given and is not the number of classes.
        DataError: if there are no class folders.
    """
    given = cfg.get('classes') or ()
    given = (given,) if isinstance(given, str) else tuple(map(str, given))
    known = next((tuple(d['metainfo']['classes']) for d in datasets if (d.get('metainfo') or {}).get('classes')), ())
    classes = given or known or _classes_of(datasets)
    if cfg.get('num_classes') not in (None, len(classes)):
        raise ConfigError(
            f'num_classes={cfg.num_classes}, but there are {len(classes)} classes ({", ".join(classes[:5])}): leave '
            'num_classes out'
        )
    for dataset in datasets:
        if not (dataset.get('metainfo') or {}).get('classes'):
            dataset['metainfo'] = ConfigDict(dataset.get('metainfo') or {}, classes=classes)
            if given:
                dataset['only_classes'] = True
    set_num_classes(cfg['model'], len(classes))
    for holder in (cfg, cfg['model']):
        if holder.get('data_preprocessor'):
            holder['data_preprocessor']['num_classes'] = len(classes)
    return {'classes', 'num_classes'} | (_fill_sizes(cfg, datasets) if cfg.get('image_size') else set())


def _classes_of(datasets: list[dict]) -> tuple[str, ...]:
    roots = [os.path.join(d.get('data_root') or '', _prefix(d)) for d in datasets]
    return class_folders(next((root for root in roots if os.path.isdir(root)), roots[0]))


def _prefix(dataset: dict) -> str:
    prefix = dataset.get('data_prefix') or ''
    return (prefix.get('img_path') or '') if isinstance(prefix, dict) else prefix


def _fill_sizes(cfg: ConfigDict, datasets: list[dict]) -> set[str]:
    size = cfg.image_size
    if not isinstance(size, int) or isinstance(size, bool) or size < 1:
        raise ConfigError(f'image_size={size!r}: it must be the side of the square images in pixels, such as 224')
    sizes = dict(RandomResizedCrop=('scale', size), ResizeEdge=('scale', round(size * EDGE)))
    sizes['CenterCrop'] = ('crop_size', size)
    pipelines = [d.get('pipeline') for d in datasets] + [cfg.get(key) for key in ('train_pipeline', 'test_pipeline')]
    for step in [step for pipeline in pipelines for step in pipeline or []]:
        setting, value = sizes.get(kind_of(step), (None, None))
        if setting and step.get(setting) is None:
            step[setting] = value
    return {'image_size'}


def check_classifier(cfg: ConfigDict) -> None:
    """Let the preprocessor of a classifier, which mixes labels, count the classes of its head.

    A number that a base config has for both follows the head if a child changes that alone, as MMPretrain's guide on
    one's own data does.

    Raises:
        ConfigError: if the two differ otherwise, or a metric is over more classes than there are.
    """
    count = (
        (cfg.get('model') or {}).get('head', {}).get('num_classes') if cfg.get('default_scope') == 'mmpretrain' else 0
    )
    if not isinstance(count, int) or count < 1:
        return
    for holder in (cfg, cfg['model']):
        preprocessor = holder.get('data_preprocessor') or {}
        stated = preprocessor.get('num_classes')
        if stated in (None, count):
            continue
        if not any(stated == before for before in _counts_of_files(cfg)):
            raise ConfigError(
                f'data_preprocessor.num_classes={stated}, but model.head.num_classes={count}: mixup and CutMix need '
                'the number of classes of the head; set both to it'
            )
        preprocessor['num_classes'] = count
    for key in ('val_evaluator', 'test_evaluator'):
        metrics = cfg.get(key) or []
        for metric in metrics if isinstance(metrics, list) else [metrics]:
            topk = metric.get('topk', 1) if kind_of(metric) == 'Accuracy' else 1
            highest = max(topk) if isinstance(topk, list | tuple) else topk
            if highest > count:
                raise ConfigError(
                    f'{key}.topk={topk}, but the model has {count} classes: set {key}.topk=1 (--cfg-options '
                    f'{key}.topk=1)'
                )


def _counts_of_files(cfg: Config) -> Iterable[int]:
    """Numbers of classes that both head and preprocessor have in one of a config's files."""
    for file in config_files(getattr(cfg, 'filename', None)):
        stage = Config.fromfile(file.path, import_custom_modules=False)
        head = ((stage.get('model') or {}).get('head') or {}).get('num_classes')
        if head is not None and head == (stage.get('data_preprocessor') or {}).get('num_classes'):
            yield head
