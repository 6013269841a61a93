"""What a config leaves open because it follows from the data: paths, classes and sizes for data of one's own."""

import os
from collections.abc import Callable, Iterable
from functools import cached_property

from mmengine.config import Config, ConfigDict
from mmengine.logging import print_log

from mmvim.compat.types import kind_of
from mmvim.config.class_counts import set_num_classes
from mmvim.config.classification import check_classifier, complete_class_folders
from mmvim.config.data import layers, parts
from mmvim.config.files import config_files
from mmvim.datasets.annotations import read_class_names
from mmvim.datasets.transforms import LoadImageFromFile
from mmvim.errors import ConfigError

SPLITS = ('train', 'val', 'test')
LONGEST = (1333, 800)  # longest and shortest side of MMDetection's usual frame
LONGEST_SEG = (4, 1)  # of MMSegmentation's
COMPLETED_KEYS = {
    'data_root', 'train_ann', 'val_ann', 'test_ann', 'train_img', 'val_img', 'test_img', 'skip_bad_images', 'classes',
    'images_outside', 'value_range',
    'num_classes', 'image_size', 'max_iters', 'ignore_index', 'reduce_zero_label', 'img_suffix', 'seg_map_suffix',
    'crop_size',
}  # fmt: skip
SIZED = dict(RandomResize='scale', Resize='scale', RandomCrop='crop_size')  # transforms, and their setting


def complete_config(cfg: ConfigDict) -> set[str]:
    """Fill in what a config leaves open from its top-level keys, so that each is stated in one place.

    - ``data_root`` goes to the data sets;
    - ``train_ann``, ``val_ann``, ``test_ann``, ``train_img``, ``val_img`` and ``test_img`` go to
      :class:`mmvim.CocoFolderDataset` and to MMSegmentation's BaseSegDataset as annotation file or folder of label maps
      and as image folder; the test split is the validation split unless it is named. ``skip_bad_images`` and
      ``images_outside`` go to the first, ``img_suffix``, ``seg_map_suffix`` and ``reduce_zero_label`` to the second;
      :class:`mmvim.ClassFolderDataset` takes ``train_img``, ``val_img`` and ``skip_bad_images``;
    - ``value_range`` goes to :class:`mmvim.LoadImageFromFile`;
    - ``classes``, or the names in all training annotations of COCO folders, or of the class folders, go to these data
      sets, and their number to ``num_classes`` of every head, and of a classifier's preprocessor;
    - ``ignore_index`` goes to everything that reads label maps: data sets, random crops, padding, heads and metric;
    - ``image_size`` goes to the transforms that resize and crop, and to the backbone's positions; for label maps crops
      and positions are of ``crop_size`` if it is given;
    - ``max_iters`` goes to the training loop, and is the end of the learning rate's schedule.

    A setting that has a value where it is used keeps it. Only the sizes and the padding value of the model change with
    these keys, if they are what one of the config's files makes of its own. Data sets that join, repeat or mix others
    are searched for these parts.

    Args:
        cfg: the config, changed in place.

    Returns:
        The top-level keys that were read: those that filled something in, and those whose None leaves it open.

    Raises:
        ConfigError: if ``num_classes`` is given and is not the number of classes, or label maps have no class names.
        DataError: if the annotation file cannot be read.
    """
    completion = _Completion(cfg)
    completion.fill_paths()
    completion.fill_value_range()
    completion.fill_classes()
    completion.fill_ignore_index()
    completion.fill_sizes()
    completion.fill_max_iters()
    check_classifier(cfg)
    return completion.used | {key for key in COMPLETED_KEYS if cfg.get(key) is None}


class _Completion:
    """One pass over a config.

    Parts go by the name of their type, as a host would have to be imported for its classes. Derived classes, such as
    MMSegmentation's ADE20KDataset, state themselves what these leave open.
    """

    def __init__(self, cfg: ConfigDict) -> None:
        self.cfg, self.used = cfg, set()
        loaders = {split: cfg.get(f'{split}_dataloader') for split in SPLITS}
        wholes = {split: loader.get('dataset') or ConfigDict() for split, loader in loaders.items() if loader}
        self.wholes = {split: whole for split, whole in wholes.items() if isinstance(whole, dict)}  # none built already
        self.datasets = {split: list(parts(whole)) for split, whole in self.wholes.items()}
        self.folders = self._of_kind('CocoFolderDataset')
        self.label_maps = self._of_kind('BaseSegDataset')
        self.class_folders = self._of_kind('ClassFolderDataset')

    def _of_kind(self, kind: str) -> list[dict]:
        return [dataset for datasets in self.datasets.values() for dataset in datasets if kind_of(dataset) == kind]

    @cached_property
    def _steps(self) -> list[dict]:
        """All transforms, also those of the top-level keys, which MMSegmentation's inference_model reads."""
        pipelines = [layer.get('pipeline') for whole in self.wholes.values() for layer in layers(whole)]
        pipelines += [self.cfg.get(key) for key in ('train_pipeline', 'test_pipeline')]
        return [step for pipeline in pipelines for step in pipeline or []]

    @cached_property
    def _stages(self) -> list[Config]:
        """The config as each of its files leaves it that names sizes or the value to ignore; none if it has no base."""
        files = config_files(getattr(self.cfg, 'filename', None))
        keys = {'image_size', 'crop_size', 'ignore_index'}
        named = [file.path for file in files if files[-1].is_child and keys & file.assigned.keys()]
        return [Config.fromfile(path, import_custom_modules=False) for path in named]

    def _fill(self, target: dict, setting: str, key: str, value: object = None) -> None:
        """Set an open setting to a top-level value, or to what follows from it."""
        if self.cfg.get(key) is not None and target.get(setting) is None:
            target[setting] = self.cfg[key] if value is None else value
            self.used.add(key)

    def _replace(self, target: dict, setting: str, key: str, follow: Callable[[dict], object]) -> None:
        """Set what follows from the config if it is open, or what followed from one of its files."""
        value, stated = follow(self.cfg), target.get(setting)
        if value is None:
            return
        followed = stated is None or _pair(stated) == _pair(value)
        # only a value that differs is worth reading the files again
        if followed or any(_pair(stated) == _pair(follow(stage)) for stage in self._stages):
            if not followed:
                print_log(f'{setting}={stated} becomes {value}, as it follows from {key}={self.cfg[key]}', 'current')
            target[setting] = value
            self.used.add(key)

    def fill_paths(self) -> None:
        """Folders and files of the data sets."""
        for split, dataset in ((split, dataset) for split, datasets in self.datasets.items() for dataset in datasets):
            self._fill(dataset, 'data_root', 'data_root')
            img, ann = (
                f'val_{kind}' if split == 'test' and self.cfg.get(f'test_{kind}') is None else f'{split}_{kind}'
                for kind in ('img', 'ann')
            )
            if dataset in self.folders:
                self._fill(dataset, 'ann_file', ann)
                self._fill(dataset, 'data_prefix', img, dict(img=self.cfg.get(img)))
                for key in ('skip_bad_images', 'images_outside'):
                    self._fill(dataset, key, key)
            elif dataset in self.class_folders:
                self._fill(dataset, 'data_prefix', img)
                self._fill(dataset, 'skip_bad_images', 'skip_bad_images')
            elif dataset in self.label_maps:
                prefix = ConfigDict(dataset.get('data_prefix') or {})
                self._fill(prefix, 'img_path', img)
                self._fill(prefix, 'seg_map_path', ann)
                if prefix:
                    dataset['data_prefix'] = prefix
                for key in ('img_suffix', 'seg_map_suffix', 'reduce_zero_label'):
                    self._fill(dataset, key, key)

    def fill_value_range(self) -> None:
        """Values of black and white in the images."""
        for step in self._steps:
            if step.get('type') in ('mmvim.LoadImageFromFile', LoadImageFromFile):
                self._fill(step, 'value_range', 'value_range')

    def fill_classes(self) -> None:
        """Names of the classes, and their number."""
        if self.class_folders:
            self.used |= complete_class_folders(self.cfg, self.class_folders)
        classes = _names(self.cfg.get('classes'))
        if self.folders:
            self._fill_classes_of_folders(classes)
        if not all(_has_classes(dataset) for dataset in self.label_maps):
            if not classes:
                raise ConfigError(
                    'no class names: label maps have none of their own, so name their values 0, 1, ... in this order, '
                    'in the config or by --cfg-options classes="[road,sky]"'
                )
            self._fill_classes(self.label_maps, classes, 'classes names')

    def _fill_classes_of_folders(self, classes: tuple[str, ...]) -> None:
        """Names and number of the classes of COCO folders, which are those of all files to train on if not given."""
        stated = next((dataset['metainfo']['classes'] for dataset in self.folders if _has_classes(dataset)), None)
        chosen, open_ones = classes or _names(stated), [one for one in self.folders if not _has_classes(one)]
        trained_on = [part for part in self.datasets.get('train', []) if part in self.folders and _is_there(part)]
        # without them, as where a model is tested, given names cannot be checked
        sources = trained_on or ([] if chosen else self._first_there())
        found = _classes_of(sources) if open_ones else ()
        unknown = [name for name in chosen if found and name not in found]
        if unknown:
            raise ConfigError(
                f'classes has {unknown}, which the annotation files to train on do not have, they have {list(found)}: '
                'correct the names (case and blanks count)'
            )
        left_out = tuple(name for name in found if chosen and name not in chosen)
        self._fill_classes(self.folders, chosen or found, 'classes names' if chosen else 'the annotation file has')
        for dataset in open_ones if left_out else ():
            dataset['metainfo']['left_out'] = left_out

    def _first_there(self) -> list[dict]:
        """COCO folders of the first split of which an annotation file is there; all if none is."""
        splits = [[part for part in split if part in self.folders] for split in self.datasets.values()]
        return next(filter(None, ([part for part in split if _is_there(part)] for split in splits)), self.folders)

    def _fill_classes(self, datasets: list[dict], classes: tuple[str, ...], source: str) -> None:
        given = self.cfg.get('num_classes')
        if given is not None and given != len(classes):
            raise ConfigError(
                f'num_classes={given}, but {source} {len(classes)} classes ({", ".join(classes)}): leave '
                'num_classes out, or use other annotations'
            )
        self.used.update(('classes', 'num_classes'))
        for dataset in datasets:
            if not _has_classes(dataset):
                dataset['metainfo'] = ConfigDict(dataset.get('metainfo') or {}, classes=classes)
        set_num_classes(self.cfg['model'], len(classes))

    def fill_ignore_index(self) -> None:
        """The value of pixels without a label."""
        if not self.label_maps:
            return
        model = self.cfg['model']
        heads = _flat(model.get(key) for key in ('decode_head', 'auxiliary_head'))
        metrics = _flat(self.cfg.get(key) for key in ('val_evaluator', 'test_evaluator'))
        kinds = ('RandomCrop', 'IoUMetric')
        readers = [part for part in [*self._steps, *metrics] if kind_of(part) in kinds]
        for part in [*heads, *self.label_maps, *readers]:
            self._fill(part, 'ignore_index', 'ignore_index')
        if model.get('data_preprocessor'):
            self._replace(
                model['data_preprocessor'], 'seg_pad_val', 'ignore_index', lambda cfg: cfg.get('ignore_index')
            )

    def fill_sizes(self) -> None:
        """Sizes of images and crops, pixels."""
        if self.class_folders:  # their pipelines are complete
            if 'img_size' in (self.cfg['model'].get('backbone') or {}):
                self._replace(
                    self.cfg['model']['backbone'], 'img_size', 'image_size', lambda cfg: cfg.get('image_size')
                )
            return
        frame, crop = self._frame(self.cfg), self._crop(self.cfg)
        if frame is None:
            return
        crop_key = 'crop_size' if self.cfg.get('crop_size') else 'image_size'
        for step in self._steps:
            setting = SIZED.get(kind_of(step))
            if setting and step.get('scale_factor') is None:
                is_crop = setting == 'crop_size'
                self._fill(step, setting, crop_key if is_crop else 'image_size', crop if is_crop else frame)
        model = self.cfg['model']
        if 'img_size' in (model.get('backbone') or {}):
            self._replace(model['backbone'], 'img_size', crop_key, self._positions)
        if self.label_maps and 'data_preprocessor' in model:
            self._replace(model['data_preprocessor'], 'size', crop_key, self._crop)

    def _frame(self, cfg: dict) -> tuple[int, int] | None:
        """Width and height that no image exceeds; None if the config's key means something else."""
        size = cfg.get('image_size')
        if isinstance(size, int):
            longest, shortest = LONGEST_SEG if self.label_maps else LONGEST
            return size * longest // shortest, size
        return tuple(size) if size and self.label_maps else None

    def _crop(self, cfg: dict) -> tuple[int, int] | None:
        """Height and width of crops."""
        frame, size = self._frame(cfg), cfg.get('image_size')
        if frame is None or not self.label_maps:
            return frame and (frame[0], frame[0])
        return _pair(cfg.get('crop_size') or (size if isinstance(size, int) else frame[::-1]))

    def _positions(self, cfg: dict) -> tuple[int, int] | None:
        """Height and width for which the backbone stores positions."""
        return self._crop(cfg) if self.label_maps else self._frame(cfg) and _pair(cfg['image_size'])

    def fill_max_iters(self) -> None:
        """Length of training."""
        if kind_of(self.cfg.get('train_cfg') or {}) == 'IterBasedTrainLoop':
            self._fill(self.cfg['train_cfg'], 'max_iters', 'max_iters')
        schedules = self.cfg.get('param_scheduler')
        if isinstance(schedules, list) and schedules and not {'milestones', 'T_max'} & set(schedules[-1]):
            self._fill(schedules[-1], 'end', 'max_iters')


def _pair(size: object) -> tuple:
    """Height and width, of which one number means both."""
    return tuple(size) if isinstance(size, list | tuple) else (size, size)


def _flat(parts: Iterable[dict | list[dict] | None]) -> list[dict]:
    return [part for entry in parts if entry for part in (entry if isinstance(entry, list) else [entry])]


def _has_classes(dataset: dict) -> bool:
    return (dataset.get('metainfo') or {}).get('classes') is not None


def _names(classes: str | Iterable | None) -> tuple[str, ...]:
    """Class names as texts; one alone, or a number, comes so from the command line."""
    return tuple(map(str, (classes,) if isinstance(classes, str | int) else classes or ()))


def _path_of(dataset: dict) -> str:
    return os.path.join(dataset.get('data_root') or '', dataset.get('ann_file') or '')


def _is_there(dataset: dict) -> bool:
    return os.path.isfile(_path_of(dataset))


def _classes_of(datasets: list[dict]) -> tuple[str, ...]:
    """Class names of annotation files, each once."""
    return tuple(dict.fromkeys(name for dataset in datasets for name in read_class_names(_path_of(dataset))))
