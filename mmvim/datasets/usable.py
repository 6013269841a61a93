"""What a detector can learn from a COCO-format file: a count of what is skipped, and of what looks wrong."""

import os
from collections import Counter

import numpy as np
from mmengine.logging import print_log

from mmvim.datasets.json_files import shown
from mmvim.errors import DataError

MUCH = 0.1  # share of annotations whose loss is worth a warning
CORNERS = 0.2  # share of boxes that leave their image, from which they are taken for corners
WARNING = 30
OTHERS, CROWD = 'of other classes', 'crowd regions'


def report(
    content: dict,
    path: str | os.PathLike,
    classes: tuple[str, ...],
    training: bool,
    masks: str | None,
    repairs: Counter,
) -> None:
    """Log what was repaired and what is skipped.

    Args:
        content: the checked file.
        path: the file.
        classes: names of the classes that the model has.
        training: whether the annotations are learned from; otherwise predictions are compared with them.
        masks: None if masks are not needed, 'any', or 'polygons' if other forms cannot be read.
        repairs: what was repaired, by name.

    Raises:
        DataError: if nothing is left to learn from, or annotations lack masks.
    """
    if any(repairs.values()):
        _log(f"annotation file '{path}': {_listed(repairs)}", 20)
    annotations = content['annotations']
    if not annotations:
        if training:
            raise DataError(f"annotation file '{path}' has no annotations: there is nothing to learn from")
        return
    boxes = np.array([entry['bbox'] for entry in annotations], float)
    sizes = {image['id']: (image['width'], image['height']) for image in content['images']}
    images = np.array([sizes[entry['image_id']] for entry in annotations], float)
    _check_unit(boxes, images, path)
    reasons = _reasons(content, boxes, images, classes)
    if masks:
        # those that nothing loads may lack one: the pipeline loads crowds, and COCOeval loads all of its classes
        unread = [which for name, which in reasons.items() if name != CROWD and (training or name == OTHERS)]
        _check_masks([annotations[i] for i in np.flatnonzero(~np.any(unread, 0))], masks, path)
    skipped, used = _skipped(reasons)
    total = len(annotations) - skipped[OTHERS]
    if training and not used.any():
        raise DataError(
            f"annotation file '{path}' leaves nothing to learn from: its {len(annotations)} annotations are "
            f'{_listed(skipped)}; correct them, or use other annotations'
        )
    if not used.any():
        _log(f"annotation file '{path}' leaves nothing to evaluate: {_listed(skipped)}; metrics will be -1", WARNING)
    elif training and skipped:
        lost = total - int(used.sum())
        _log(
            f"annotation file '{path}': {int(used.sum())} of {len(annotations)} annotations are trained on, left out: "
            f'{_listed(skipped)}',
            WARNING if lost > MUCH * total else 20,
        )
    _report_empty(content, used, classes, training, path)
    _report_twice(annotations, boxes, path)


def _log(text: str, level: int) -> None:
    print_log(text, 'current', level)


def _listed(counts: Counter) -> str:
    return ', '.join(f'{count} {name}' for name, count in counts.items() if count)


def _reasons(content: dict, boxes: np.ndarray, images: np.ndarray, classes: tuple[str, ...]) -> dict[str, np.ndarray]:
    """For each reason why MMDetection's CocoDataset does not train on an annotation, which it holds for."""
    annotations = content['annotations']
    known = {category['id'] for category in content['categories'] if category['name'] in classes}
    inside = np.minimum(boxes[:, :2] + boxes[:, 2:], images) - np.maximum(boxes[:, :2], 0)
    return {
        OTHERS: np.array([entry['category_id'] not in known for entry in annotations]),
        'marked to be ignored': np.array([bool(entry.get('ignore')) for entry in annotations]),
        CROWD: np.array([entry['iscrowd'] == 1 for entry in annotations]),
        'narrower than a pixel': (boxes[:, 2:] < 1).any(1),
        'outside their images': (inside <= 0).any(1),
    }


def _skipped(reasons: dict[str, np.ndarray]) -> tuple[Counter, np.ndarray]:
    """How many annotations are skipped, each for its first reason, and which are used."""
    used, skipped = np.ones(len(reasons[OTHERS]), bool), Counter()
    for name, which in reasons.items():
        if count := int((used & which).sum()):
            skipped[name] = count
        used &= ~which
    return skipped, used


def _check_unit(boxes: np.ndarray, images: np.ndarray, path: str | os.PathLike) -> None:
    """Refuse fractions of the image, and warn of corners in place of sizes."""
    ends = boxes[:, :2] + boxes[:, 2:]
    if ends.max() <= 1.01 and images.min() > 2:
        raise DataError(
            f"annotation file '{path}' has boxes in fractions of the image, the first is {shown(boxes[0].tolist())}: "
            'multiply them (and masks) by width and height, COCO counts in pixels'
        )
    corners = ((boxes[:, 2:] > boxes[:, :2]) & (boxes[:, 2:] <= images + 1)).all(1)
    out = (ends > images + 1).any(1)
    if corners.all() and out.mean() > CORNERS:
        _log(
            f"annotation file '{path}': {out.sum()} of {len(boxes)} boxes leave their image, and all would fit as "
            f'corners (x1, y1, x2, y2), the first is {shown(boxes[0].tolist())}: COCO boxes are (x, y, width, height); '
            'convert them if they are corners',
            WARNING,
        )


def _check_masks(used: list[dict], masks: str, path: str | os.PathLike) -> None:
    bare = [entry['id'] for entry in used if not entry.get('segmentation')]
    if bare:
        raise DataError(
            f"annotation file '{path}': {len(bare)} of {len(used)} annotations have no 'segmentation' (the first has "
            f'id {bare[0]}): add masks, or train boxes only with with_mask=False in LoadAnnotations and '
            'model.roi_head.mask_head=None'
        )
    others = [entry['id'] for entry in used if isinstance(entry['segmentation'], dict)] if masks == 'polygons' else []
    if others:
        raise DataError(
            f"annotation file '{path}': {len(others)} of {len(used)} masks are RLE (the first has id {others[0]}), "
            'which LoadAnnotations cannot read with poly2mask=False: set poly2mask=True, or convert them to polygons'
        )


def _report_empty(
    content: dict, used: np.ndarray, classes: tuple[str, ...], training: bool, path: str | os.PathLike
) -> None:
    """Name the classes of the model that the file lists and has no annotation of."""
    found = {content['annotations'][i]['category_id'] for i in np.flatnonzero(used)}
    empty = [c for c in content['categories'] if c['id'] not in found and c['name'] in classes]
    if not empty or not found:
        return
    names = [category['name'] for category in empty]
    groups = [c.get('supercategory') for c in content['categories'] if c['id'] in found]
    parents = [name for name in names if name in groups]
    hint = f'; {parents[0]!r} is the supercategory of others: set classes to those' if parents else ''
    effect = 'they are not learnt' if training else 'the metrics leave them out'
    rest = f' and {len(names) - 10} others' if names[10:] else ''
    _log(f"annotation file '{path}' has no annotation of {names[:10]}{rest}, {effect}{hint}", WARNING)


def _report_twice(annotations: list[dict], boxes: np.ndarray, path: str | os.PathLike) -> None:
    """Name boxes that an image has twice with one class, which an export that ran twice leaves."""
    keys = [(entry['image_id'], entry['category_id'], *entry['bbox']) for entry in annotations]
    if (twice := len(keys) - len(set(keys))) > 0:
        first = next(key for key, count in Counter(keys).items() if count > 1)
        _log(
            f"annotation file '{path}': {twice} annotations repeat another's box and class, the first in image "
            f'{shown(first[0])} with bbox {shown(list(first[2:]))}: remove them if they are not meant',
            WARNING if twice > MUCH * len(keys) else 20,
        )
