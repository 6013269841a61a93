"""Reading COCO-format annotation files from anywhere: checked, and completed where exporters leave keys out."""

import os
from collections import Counter
from functools import lru_cache
from typing import Any

from mmvim.datasets.entries import check_annotations, check_categories, check_images
from mmvim.datasets.json_files import read_json
from mmvim.errors import DataError

KEYS = ('images', 'annotations', 'categories')


def read_annotations(
    path: str | os.PathLike,
    backend_args: dict | None = None,
    with_masks: bool = False,
    with_truth: bool = True,
    repairs: Counter | None = None,
) -> dict:
    """Read a COCO-format detection file.

    Repaired is what has one meaning only: ``id`` of annotations (where one is missing, not unique or no number above
    0), ``area`` (where missing or not above 0: the box's), ``iscrowd`` (where missing: 0), class names that are numbers
    (as text), whole numbers written as 1.0, a polygon outside a list, and images listed twice.

    Args:
        path: the file.
        backend_args: storage of the file, as in mmengine.
        with_masks: check the masks too.
        with_truth: refuse a file without 'annotations'; otherwise it has none.
        repairs: counts what was repaired, by name.

    Returns:
        The content, with the keys images, annotations and categories.

    Raises:
        DataError: if the file is missing, not JSON, or lacks what detection needs; the message names file and entry.
    """
    content: Any = read_json(path, backend_args)
    needed = KEYS if with_truth or not isinstance(content, dict) or 'annotations' in content else KEYS[::2]
    missing = [key for key in needed if not isinstance(content, dict) or not isinstance(content.get(key), list)]
    if missing:
        hint = ''
        if missing == ['annotations'] and 'annotations' not in content:
            hint = '; to predict without any, set format_only=True and outfile_prefix in test_evaluator'
        raise DataError(
            f"annotation file '{path}' has no list {missing}: it must be a COCO detection file with {list(KEYS)}{hint}"
        )
    if not content['images']:
        raise DataError(f"annotation file '{path}' lists no images: name a file with at least one")
    repairs = Counter() if repairs is None else repairs
    content.setdefault('annotations', [])
    content['categories'] = check_categories(content['categories'], path)
    content['images'] = check_images(content['images'], path, repairs)
    check_annotations(content, path, with_masks, repairs)
    return content


def class_names(content: dict, path: str | os.PathLike) -> tuple[str, ...]:
    """Names of the categories of a COCO-format file, in its order; those that are numbers as text.

    Raises:
        DataError: if there are none, or two of the same name or id.
    """
    categories = content.get('categories')
    return tuple(entry['name'] for entry in check_categories(categories if isinstance(categories, list) else [], path))


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
    content = read_json(path)
    return class_names(content if isinstance(content, dict) else {}, path)
