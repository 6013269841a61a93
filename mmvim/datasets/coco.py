"""Detection data sets: any COCO-format folder, and the generated shapes."""

import os
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

from mmdet.datasets import CocoDataset
from mmdet.datasets.api_wrappers import COCO
from mmengine.logging import print_log

from mmvim.arguments import check_choice, check_flags
from mmvim.compat.types import kind_of
from mmvim.datasets.annotations import class_names, read_annotations
from mmvim.datasets.shapes import CLASSES, PALETTE, SPLITS, ensure_shapes
from mmvim.datasets.transforms import decode_image
from mmvim.errors import DataError
from mmvim.registry import DATASETS


class CheckedCOCO(COCO):
    """pycocotools' index of a file read by :func:`read_annotations`, whose categories are looked up by name.

    Args:
        annotation_file: the file.
        with_masks: refuse annotations without a mask.
    """

    def __init__(self, annotation_file: str, with_masks: bool = False) -> None:
        super().__init__()
        self.dataset = read_annotations(annotation_file, with_masks=with_masks)
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
        free = min(ids.values(), default=0) - 1
        for name in cat_names:
            if name not in ids:
                self.cats[free] = dict(id=free, name=name)
                ids[name], free = free, free - 1
        return [ids[name] for name in cat_names]


@DATASETS.register_module()
class CocoFolderDataset(CocoDataset):
    """A folder of images with a COCO-format annotation file, with any classes and category ids.

    The class names are those of the file, or the given ones, so that a validation file may order them differently or
    lack some. ``metainfo`` has them as ``classes`` and the path of the file as ``ann_file``.

    Args:
        ann_file: annotation file, absolute or relative to data_root.
        data_root: folder of the data set.
        data_prefix: ``dict(img=...)``, the image folder, absolute or relative to data_root.
        metainfo: may hold ``classes``, the class names in the order of the model's outputs.
        skip_bad_images: decode every image once at the start, leave out those that are missing, unreadable or
            truncated, and log their names; otherwise the first such image ends the run.
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
        **kwargs,
    ) -> None:
        for key, value in dict(ann_file=ann_file, data_root=data_root).items():
            if not isinstance(value, str | os.PathLike):
                raise DataError(f'{key} of {type(self).__name__} must be a path, got {value!r}')
        for key, value in dict(data_prefix=data_prefix, metainfo=metainfo).items():
            if value is not None and not isinstance(value, dict):
                raise DataError(f'{key} of {type(self).__name__} must be a dict, got {value!r}')
        check_flags(skip_bad_images=skip_bad_images)
        if not ann_file:
            raise DataError(
                'no annotation file: set train_ann and val_ann (and data_root, train_img, val_img) in the config or '
                'by --cfg-options, and build the run with mmvim.Runner, or give this data set ann_file'
            )
        path = ann_file if os.path.isabs(ann_file) else os.path.join(data_root, ann_file)
        if data_root and not os.path.isdir(data_root):
            raise DataError(f"data folder '{data_root}' does not exist: set data_root to the folder of the data set")
        self.with_masks = any(
            kind_of(step) == 'LoadAnnotations' and step.get('with_mask')
            for step in kwargs.get('pipeline', ())
            if isinstance(step, dict)
        )
        self._index: CheckedCOCO | None = CheckedCOCO(path, self.with_masks)
        found = class_names(self._index.dataset, path)
        classes = tuple((metainfo or {}).get('classes', found))
        unknown = [name for name in found if name not in classes]
        if unknown:
            raise DataError(
                f"annotation file '{path}' has classes {unknown} that the model does not know; it knows "
                f'{list(classes)}: rename them in the file, or train with a file that has them'
            )
        self.skip_bad_images = skip_bad_images
        super().__init__(
            ann_file=ann_file,
            data_root=data_root,
            data_prefix=data_prefix or dict(img=''),
            metainfo={**(metainfo or {}), 'classes': classes},
            **kwargs,
        )
        # Not through the argument: mmengine replaces a path in it by the lines of the file.
        self._metainfo['ann_file'] = path

    def COCOAPI(self, path: str) -> CheckedCOCO:  # noqa: N802
        """Hand over the index of the annotation file, where CocoDataset has its class: the file is read once."""
        index, self._index = self._index, None
        return index or CheckedCOCO(path, self.with_masks)

    def load_data_list(self) -> list[dict]:
        """Samples of all images that can be used."""
        samples = super().load_data_list()
        folder = self.data_prefix['img']
        if not os.path.isdir(folder):
            raise DataError(
                f"image folder '{folder}' does not exist: set train_img or val_img to the folder below data_root "
                'that the file names in the annotation file start from'
            )
        if self.skip_bad_images:
            return self._without_bad(samples)
        missing = [sample['img_path'] for sample in samples if not os.path.exists(sample['img_path'])]
        if missing:
            raise DataError(
                f"{len(missing)} of {len(samples)} images of '{self.ann_file}' do not exist, the first is "
                f"'{missing[0]}': correct the image folder (train_img, val_img), or set skip_bad_images=True to leave "
                'them out'
            )
        return samples

    def _without_bad(self, samples: list[dict]) -> list[dict]:
        def problem(sample: dict) -> str | None:
            path = Path(sample['img_path'])
            try:
                image = decode_image(path.read_bytes(), str(path))
            except (OSError, DataError) as error:
                return str(error)
            same = image.shape[:2] == (sample['height'], sample['width'])
            return None if same else f'{image.shape[:2]} pixels instead of {(sample["height"], sample["width"])}'

        with ThreadPoolExecutor(4) as pool:
            problems = list(pool.map(problem, samples))
        bad = [sample['img_path'] for sample, text in zip(samples, problems, strict=True) if text]
        if bad:
            print_log(f'{len(bad)} of {len(samples)} images are unusable and left out: {bad}', 'current', 30)
        if len(bad) == len(samples):
            raise DataError(f"none of the {len(bad)} images of '{self.ann_file}' can be read; the first: {problems[0]}")
        return [sample for sample, text in zip(samples, problems, strict=True) if not text]


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
