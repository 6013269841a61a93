"""Masks in the forms of COCO, checked before pycocotools reads them.

pycocotools believes what it is given: a wrong size or run length ends in a crash, in gigabytes of memory or in a
scrambled mask.
"""

import math
from collections.abc import Sequence

import numpy as np

from mmvim.datasets.json_files import shown

NUMBERS = frozenset((int, float))  # not bool
REACH = 10  # sides of the image by which coordinates may be off; further out they are mistakes, and costly to draw
_DIGITS = 7  # characters that a run length has at most
Extent = tuple[float, float, float, float]  # x and y from, x and y to


class BadMaskError(ValueError):
    """What is wrong with a mask, and the remedy."""


def is_flat(mask: object) -> bool:
    """Whether a mask is one polygon [x, y, ...] in place of a list of polygons."""
    return isinstance(mask, list) and len(mask) >= 6 and NUMBERS.issuperset(map(type, mask))


def check_polygons(polygons: list, height: int, width: int) -> Extent:
    """Check a list of polygons [x, y, x, y, ...].

    Returns:
        The extent of all points.

    Raises:
        BadMaskError: if pycocotools cannot draw them in an image of this size.
    """
    reach = REACH * max(height, width)
    xs, ys = [], []
    for polygon in polygons:
        if type(polygon) is not list or not NUMBERS.issuperset(map(type, polygon)):
            raise BadMaskError(f'{shown(polygon)} is no polygon: it must be a list of numbers [x1, y1, x2, y2, ...]')
        if len(polygon) < 6 or len(polygon) % 2:
            what = 'a box is no polygon, give its corners' if len(polygon) == 4 else 'three points or more are needed'
            raise BadMaskError(f'polygon {shown(polygon)} has {len(polygon)} numbers: {what}, x and y for each')
        x, y = polygon[::2], polygon[1::2]
        xs += (min(x), max(x))
        ys += (min(y), max(y))
        # NaN compares as False, and only the sum shows one that is not the first
        if not (-reach <= min(xs[-2], ys[-2]) and max(xs[-1], ys[-1]) <= reach and math.isfinite(sum(polygon))):
            worst = next((v for v in polygon if not -reach <= v <= reach), polygon[0])
            raise BadMaskError(
                f'polygon coordinate {shown(worst)} is not within {REACH} sides of the image of {height} rows and '
                f'{width} columns: correct or remove the polygon'
            )
    return min(xs), min(ys), max(xs), max(ys)


def differs(extent: Sequence[float], box: Sequence[float]) -> bool:
    """Whether two boxes (x, y, width, height) have an intersection of less than half of their union."""
    (x, y, w, h), (x2, y2, w2, h2) = extent, box
    across, down = min(x + w, x2 + w2) - max(x, x2), min(y + h, y2 + h2) - max(y, y2)
    common = max(across, 0) * max(down, 0)
    return 2 * common < w * h + w2 * h2 - common


def check_rle(mask: dict, height: int, width: int) -> bool:
    """Check run lengths; those of a compressed mask are left to :func:`check_compressed`.

    Returns:
        Whether the mask is compressed.

    Raises:
        BadMaskError: if it is not a mask of an image of this size.
    """
    size, counts = mask.get('size'), mask.get('counts')
    if size != [height, width] or any(type(side) is not int for side in size):
        hint = ', the order is height, width' if size == [width, height] else ''
        raise BadMaskError(
            f'RLE size {shown(size)} is not that of the image, [{height}, {width}]{hint}: export the mask again'
        )
    if isinstance(counts, str):
        return True
    if not isinstance(counts, list) or {int} != set(map(type, counts)) or min(counts) < 0:
        raise BadMaskError(f'RLE counts {shown(counts)} must be a string, or a list of whole numbers from 0')
    _check_sum(sum(counts), height, width)
    return False


def _check_sum(pixels: int, height: int, width: int) -> None:
    if pixels != height * width:
        raise BadMaskError(
            f'RLE counts cover {pixels} pixels, the image has {height * width}: export the mask again for this image'
        )


def check_compressed(counts: str, height: int, width: int) -> None:
    """Check the run lengths of one compressed mask.

    Raises:
        BadMaskError: if it is not a mask of an image of this size.
    """
    sums = compressed_pixels([counts])
    if sums is None:
        hint = ', as Python shows bytes: decode them before saving' if counts[:2] in ("b'", 'b"') else ''
        raise BadMaskError(f'RLE counts {shown(counts)} are no compressed run lengths{hint}: export the mask again')
    _check_sum(int(sums[0]), height, width)


def compressed_pixels(masks: Sequence[str]) -> np.ndarray | None:
    """Pixels that each of many compressed masks covers, objects and background; None if one is invalid.

    pycocotools (maskApi.c, rleFrString) writes a run in characters of five bits from 48 on, least significant first,
    with a sixth bit where more follow; from the fourth run on it is the difference to the run before the last.
    """
    lengths = np.fromiter(map(len, masks), np.int64, len(masks))
    try:
        codes = np.frombuffer(''.join(masks).encode('ascii'), np.uint8).astype(np.int64) - 48
    except UnicodeEncodeError:
        return None
    ends_of_masks = lengths.cumsum() - 1
    if not len(codes) or lengths.min() < 1 or codes.min() < 0 or codes.max() > 63:
        return None
    is_end = (codes & 32) == 0
    if not is_end[ends_of_masks].all():
        return None
    ends = np.flatnonzero(is_end)
    starts = np.concatenate(([0], ends[:-1] + 1))
    digits = ends - starts + 1
    if digits.max() > _DIGITS:
        return None
    runs = np.add.reduceat((codes & 31) << 5 * (np.arange(len(codes)) - np.repeat(starts, digits)), starts)
    runs -= np.where(codes[ends] & 16, 1 << 5 * digits, 0)
    owner = np.searchsorted(ends_of_masks, ends)
    number = np.arange(len(ends)) - np.searchsorted(owner, owner)  # of the run in its mask
    chain = 3 * owner + np.where(number == 0, 0, 2 - number % 2)  # runs that are differences to one another
    order = np.argsort(chain, kind='stable')
    chain, total = chain[order], runs[order].cumsum()
    first = np.searchsorted(chain, chain)
    runs = total - np.where(first > 0, total[first - 1], 0)
    if runs.min() < 0:
        return None
    return np.bincount(owner[order], runs, len(masks))
