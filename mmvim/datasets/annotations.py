"""Reading COCO-format annotation files from anywhere: checked, and completed where exporters leave keys out."""

import json
import os
from collections import Counter
from functools import lru_cache

from mmengine.fileio import get_local_path

from mmvim.errors import DataError

KEYS = ('images', 'annotations', 'categories')


def read_annotations(path: str | os.PathLike, backend_args: dict | None = None, with_masks: bool = False) -> dict:
    """Read a COCO-format detection file.

    ``id`` (where missing or not unique), ``area`` (where missing or 0: the box's) and ``iscrowd`` (0) of annotations
    are filled in.

    Args:
        path: the file.
        backend_args: storage of the file, as in mmengine.
        with_masks: refuse annotations without a mask.

    Returns:
        The content, with the keys images, annotations and categories.

    Raises:
        DataError: if the file is missing, not JSON, or lacks what detection needs; the message names file and entry.
    """
    content = _read_json(path, backend_args)
    missing = [key for key in KEYS if not isinstance(content, dict) or not isinstance(content.get(key), list)]
    if missing:
        raise DataError(
            f"annotation file '{path}' has no list {missing}: it must be a COCO detection file with {list(KEYS)}"
        )
    if not content['images']:
        raise DataError(f"annotation file '{path}' lists no images: name a file with at least one")
    class_names(content, path)
    _check_images(content['images'], path)
    _complete_annotations(content, path, with_masks)
    return content


def class_names(content: dict, path: str | os.PathLike) -> tuple[str, ...]:
    """Names of the categories of a COCO-format file, in its order.

    Raises:
        DataError: if there are none, or two of the same name.
    """
    categories = content.get('categories') or []
    names = [category.get('name') if isinstance(category, dict) else None for category in categories]
    if not names or None in names:
        raise DataError(f"annotation file '{path}' names no classes: every entry of 'categories' needs id and name")
    twice = [name for name, count in Counter(names).items() if count > 1]
    if twice:
        raise DataError(f"annotation file '{path}' has two categories of the name {twice[0]!r}: rename or merge them")
    return tuple(str(name) for name in names)


def read_class_names(path: str | os.PathLike) -> tuple[str, ...]:
    """Names of the classes in a COCO-format file, in its order.

    A file is read once until it changes: a config is completed when it is checked, and again by the runner.

    Raises:
        DataError: as :func:`read_annotations`.
    """
    state = os.stat(path) if os.path.exists(path) else None
    return _class_names_of(str(path), *((state.st_mtime_ns, state.st_size) if state else ()))


@lru_cache(maxsize=8)
def _class_names_of(path: str, *state: int) -> tuple[str, ...]:
    content = _read_json(path, None)
    return class_names(content if isinstance(content, dict) else {}, path)


def _read_json(path: str | os.PathLike, backend_args: dict | None) -> object:
    try:
        with get_local_path(str(path), backend_args=backend_args) as local_path, open(local_path) as file:
            return json.load(file)
    except FileNotFoundError:
        folder = os.path.dirname(path) or '.'
        what = 'its folder is missing too' if not os.path.isdir(folder) else f"'{folder}' is there"
        raise DataError(
            f"annotation file '{path}' does not exist ({what}): set data_root and the annotation files, for example "
            '--cfg-options data_root=... train_ann=... val_ann=...'
        ) from None
    except IsADirectoryError:
        raise DataError(f"annotation file '{path}' is a folder: name the JSON file in it") from None
    except ValueError as error:
        raise DataError(f"annotation file '{path}' is not JSON ({error}): export it in COCO format") from None


def _check_images(images: list[dict], path: str | os.PathLike) -> None:
    for key in ('id', 'file_name', 'height', 'width'):
        for image in images:
            if image.get(key) is None:
                raise DataError(f"annotation file '{path}': image entry {image} has no '{key}'; add it to every image")
    twice = [number for number, count in Counter(image['id'] for image in images).items() if count > 1]
    if twice:
        raise DataError(f"annotation file '{path}': two images have the id {twice[0]}; ids must be unique")


def _complete_annotations(content: dict, path: str | os.PathLike, with_masks: bool) -> None:
    annotations = content['annotations']
    known = dict(
        image_id={image['id'] for image in content['images']},
        category_id={category.get('id') for category in content['categories']},
    )
    for annotation in annotations:
        for key, legal in known.items():
            if annotation.get(key) not in legal:
                raise DataError(
                    f"annotation file '{path}': annotation {annotation.get('id')} has {key} {annotation.get(key)}, "
                    f"which '{'images' if key == 'image_id' else 'categories'}' does not list"
                )
        box = annotation.get('bbox')
        if not isinstance(box, list) or len(box) != 4:
            raise DataError(
                f"annotation file '{path}': annotation {annotation.get('id')} has no bbox of four numbers "
                '(x, y, width, height)'
            )
        annotation.setdefault('iscrowd', 0)
        if not annotation.get('area'):
            annotation['area'] = box[2] * box[3]
    if len({annotation.get('id') for annotation in annotations} - {None}) < len(annotations):
        for number, annotation in enumerate(annotations, 1):
            annotation['id'] = number
    bare = [a['id'] for a in annotations if not a.get('segmentation')] if with_masks else []
    if bare:
        raise DataError(
            f"annotation file '{path}': {len(bare)} of {len(annotations)} annotations have no 'segmentation' (the "
            f'first has id {bare[0]}): add masks, or train boxes only with with_mask=False in LoadAnnotations and '
            'model.roi_head.mask_head=None'
        )
