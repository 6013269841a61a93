"""Detection data sets: any COCO-format folder, and the generated shapes."""

import os
from collections import Counter
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from functools import partial

from mmdet.datasets import CocoDataset
from mmdet.datasets.api_wrappers import COCO
from mmengine.logging import print_log

from mmvim.arguments import check_choice, check_flags
from mmvim.datasets.annotations import class_names, read_annotations
from mmvim.datasets.image_files import similar
from mmvim.datasets.image_paths import check_paths
from mmvim.datasets.shapes import CLASSES, PALETTE, SPLITS, ensure_shapes
from mmvim.datasets.transforms import read_image
from mmvim.datasets.usable import report
from mmvim.errors import DataError
from mmvim.registry import DATASETS


class CheckedCOCO(COCO):
    """pycocotools' index of a file read by :func:`read_annotations`, whose categories are looked up by name.

    Args:
        annotation_file: the file.
        settings: arguments of :func:`read_annotations`.
    """

    def __init__(self, annotation_file: str, **settings) -> None:
        super().__init__()
        self.dataset = read_annotations(annotation_file, **settings)
        self.createIndex()
        self.img_ann_map, self.cat_img_map = self.imgToAnns, self.catToImgs

    def get_cat_ids(self, cat_names: Sequence[str] = (), sup_names=(), cat_ids=()) -> list[int]:
        """Ids of the categories of these names, in their order.

        A name that the file does not have gets an id of its own below all others, so that the class of the i-th name
        is i in every split.
        """
        if not cat_names:
            return self.getCatIds(cat_names, sup_names, cat_ids)
        ids = {category['name']: category['id'] for category in self.cats.values()}
        texts = any(isinstance(number, str) for number in ids.values())
        lowest = 0 if texts else int(min(ids.values(), default=0))
        for count, name in enumerate((name for name in cat_names if name not in ids), 1):
            free = f'no category {name}' if texts else lowest - count
            self.cats[free], ids[name] = dict(id=free, name=name), free
        return [ids[name] for name in cat_names]


@DATASETS.register_module()
class CocoFolderDataset(CocoDataset):
    """A folder of images with a COCO-format annotation file, with any classes and category ids.

    The class names are those of the file, or the given ones. A file may order them differently, lack some, or have
    others, whose annotations are left out and logged. ``metainfo`` has the names as ``classes``, and with ``test_mode``
    the path of the file as ``ann_file``.

    Args:
        ann_file: annotation file, absolute or relative to data_root; with ``test_mode`` it may have no annotations.
        data_root: folder of the data set.
        data_prefix: ``dict(img=...)``, the image folder, absolute or relative to data_root.
        metainfo: may hold ``classes``, the class names in the order of the model's outputs, and ``left_out``, those
            known not to be among them.
        skip_bad_images: decode every image once at the start, leave out those that are missing, unreadable or
            truncated, and log their names; otherwise the first such image ends the run.
        images_outside: follow file names and links that lead out of the image folder; otherwise they end the run.
        kwargs: arguments of MMDetection's CocoDataset.

    Raises:
        DataError: if something is missing or wrong; the message names the file.
    """

    METAINFO: dict = {}

    def __init__(
        self,
        ann_file: str = '',
        data_root: str = '',
        data_prefix: dict | None = None,
        metainfo: dict | None = None,
        skip_bad_images: bool = False,
        images_outside: bool = False,
        **kwargs,
    ) -> None:
        for key, value in dict(ann_file=ann_file, data_root=data_root).items():
            if not isinstance(value, str | os.PathLike):
                raise DataError(f'{key} of {type(self).__name__} must be a path, got {value!r}')
        for key, given in dict(data_prefix=data_prefix, metainfo=metainfo).items():
            if given is not None and not isinstance(given, dict):
                raise DataError(f'{key} of {type(self).__name__} must be a dict, got {given!r}')
        check_flags(skip_bad_images=skip_bad_images, images_outside=images_outside)
        if not ann_file:
            raise DataError(
                'no annotation file: set train_ann and val_ann (and data_root, train_img, val_img) in the config or '
                'by --cfg-options, and build the run with mmvim.Runner, or give this data set ann_file'
            )
        path = ann_file if os.path.isabs(ann_file) else os.path.join(data_root, ann_file)
        if data_root and not os.path.isdir(data_root):
            raise DataError(f"data folder '{data_root}' does not exist: set data_root to the folder of the data set")
        masks, training = _masks_of(kwargs.get('pipeline', ())), not kwargs.get('test_mode', False)
        repairs: Counter = Counter()
        self._read = partial(CheckedCOCO, path, with_masks=bool(masks), with_truth=training, repairs=repairs)
        self._index: CheckedCOCO | None = self._read()
        classes = _choose_classes(class_names(self._index.dataset, path), metainfo or {}, path)
        report(self._index.dataset, path, classes, training, masks, repairs)
        self.skip_bad_images, self.images_outside = skip_bad_images, images_outside
        known = {key: value for key, value in (metainfo or {}).items() if key != 'left_out'}
        super().__init__(
            ann_file=ann_file,
            data_root=data_root,
            data_prefix=data_prefix or dict(img=''),
            metainfo={**known, 'classes': classes},
            **kwargs,
        )
        if not training:  # the metrics' file; files to train on can be joined only if their metainfo is the same
            # Not through the argument: mmengine replaces a path in it by the lines of the file.
            self._metainfo['ann_file'] = path

    def COCOAPI(self, path: str) -> CheckedCOCO:  # noqa: N802
        """Hand over the index of the annotation file, where CocoDataset has its class: the file is read once."""
        index, self._index = self._index, None
        return index or self._read()

    def load_data_list(self) -> list[dict]:
        """Samples of all images that can be used."""
        samples = super().load_data_list()
        folder = self.data_prefix['img']
        if not os.path.isdir(folder):
            raise DataError(
                f"image folder '{folder}' does not exist: set train_img or val_img to the folder below data_root "
                'that the file names in the annotation file start from'
            )
        paths = [sample['img_path'] for sample in samples]
        missing = check_paths(paths, folder, self.ann_file, self.images_outside, self.skip_bad_images)
        if self.skip_bad_images:
            samples = self._without_bad(samples)
            if not self.test_mode and not any(not i['ignore_flag'] for s in samples for i in s['instances']):
                raise DataError(f"the images of '{self.ann_file}' that can be read leave nothing to learn from")
        elif missing:
            backslash = '; its \\ separates folders on Windows only, write /'
            hint = backslash if '\\' in missing[0] else similar(missing[0])
            raise DataError(
                f"{len(missing)} of {len(samples)} images of '{self.ann_file}' do not exist, the first is "
                f"'{missing[0]}'{hint}: correct the image folder (train_img, val_img), or set skip_bad_images=True to "
                'leave them out'
            )
        return samples

    def _without_bad(self, samples: list[dict]) -> list[dict]:
        def problem(sample: dict) -> str | None:
            try:
                read_image(sample['img_path'], stated=(sample['height'], sample['width']))
            except DataError as error:
                return str(error)
            return None

        with ThreadPoolExecutor(4) as pool:
            problems = list(pool.map(problem, samples))
        bad = [sample['img_path'] for sample, text in zip(samples, problems, strict=True) if text]
        if bad:
            print_log(f'{len(bad)} of {len(samples)} images are unusable and left out: {bad}', 'current', 30)
        if len(bad) == len(samples):
            raise DataError(f"none of the {len(bad)} images of '{self.ann_file}' can be read; the first: {problems[0]}")
        return [sample for sample, text in zip(samples, problems, strict=True) if not text]


def _masks_of(pipeline: Sequence[dict]) -> str | None:
    """Which masks a pipeline reads: None, 'any', or 'polygons' alone."""
    for step in pipeline:
        if isinstance(step, dict) and step.get('with_mask'):
            return 'any' if step.get('poly2mask', True) else 'polygons'
    return None


def _choose_classes(found: tuple[str, ...], metainfo: dict, path: str) -> tuple[str, ...]:
    """The classes of a data set, of which its file may have more or fewer.

    Raises:
        DataError: if names look misspelt: the file has unknown ones and lacks some of the model's.
    """
    given = metainfo.get('classes')
    if given is None:
        return found
    classes = tuple(map(str, (given,) if isinstance(given, str) else given))
    if not classes or len(set(classes)) < len(classes):
        raise DataError(f'classes {list(classes)} of the data set must be names that differ: correct metainfo')
    unknown = [name for name in found if name not in classes and name not in metainfo.get('left_out', ())]
    missing = [name for name in classes if name not in found]
    if (unknown and missing) or len(missing) == len(classes):
        raise DataError(
            f"annotation file '{path}' has classes {unknown or list(found)} that the model does not know; it knows "
            f'{list(classes)}: rename them in the file, or train with a file that has them'
        )
    others = [name for name in found if name not in classes]
    if others:
        print_log(f"annotation file '{path}': the classes {others} are left out", 'current', 30 if unknown else 20)
    return classes


@DATASETS.register_module()
class ShapesDataset(CocoFolderDataset):
    """The demo data set of drawn shapes, generated into its folder on first use.

    Args:
        split: 'train' or 'val'.
        data_root: folder of the data set; generated when it is missing or empty.
        shapes: arguments of :func:`mmvim.datasets.shapes.shapes_recipe` other than their defaults.
        kwargs: arguments of CocoFolderDataset.

    Raises:
        ValueError: if there is no such split, or an argument of the recipe is illegal.
        FileExistsError: if the folder holds other files, or shapes generated with other arguments.
    """

    def __init__(
        self, split: str = 'train', data_root: str = 'data/shapes', shapes: dict | None = None, **kwargs
    ) -> None:
        check_choice('split', split, SPLITS)
        ensure_shapes(data_root, **(shapes or {}))
        super().__init__(
            ann_file=f'annotations/{split}.json',
            data_root=data_root,
            data_prefix=dict(img=split),
            metainfo=dict(classes=CLASSES, palette=list(PALETTE)),
            **kwargs,
        )
