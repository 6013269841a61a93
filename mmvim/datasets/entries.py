"""Checks of the entries of a COCO-format file: images, categories and annotations.

The first wrong entry is an error that names it. What pycocotools and MMDetection read as it is meant is left alone.
"""

import os
from collections import Counter
from collections.abc import Iterable

from mmengine.logging import print_log

from mmvim.datasets.json_files import shown
from mmvim.datasets.masks import (
    NUMBERS,
    REACH,
    BadMaskError,
    check_compressed,
    check_polygons,
    check_rle,
    compressed_pixels,
    differs,
    is_flat,
)
from mmvim.errors import DataError

LARGEST = 2**31  # pixels of an image; pycocotools counts in 32 bits
LARGEST_ID = 2**63
CHUNK = 200_000  # annotations between two lines of progress
BATCH = 500_000  # characters of compressed masks checked together
SAMPLE = 20_000  # polygons whose extent is compared with their boxes
FOREIGN = {'segments_info': 'that of a panoptic file', 'caption': 'a caption'}  # by a key of theirs
FLAGS = (0, 1)  # equal to 0.0, 1.0, False and True


class _WrongError(ValueError):
    """What is wrong with a value, and the remedy."""


def _is_text(name: str) -> bool:
    """Whether a name can be written to a file, and can be one's name: not so with half of a character or a NUL."""
    return '\0' not in name and name == name.encode(errors='ignore').decode()


def _describe(value: object) -> str:
    """A value with its type where that may be what is wrong with it."""
    return f'the text {shown(value)}' if isinstance(value, str) else shown(value)


def _check_id(value: object, what: str) -> None:
    if type(value) is str and value:
        return
    whole = type(value) is int or (type(value) is float and value.is_integer())
    if not whole or not -LARGEST_ID <= value < LARGEST_ID:
        raise _WrongError(f'has the {what} {shown(value)}: it must be a whole number of at most 63 bits, or a text')


def _check_ids(entries: list[dict], path: str | os.PathLike, what: str) -> None:
    """Refuse ids that are no ids, or numbers and texts in one list."""
    for index, entry in enumerate(entries):
        try:
            _check_id(entry.get('id'), 'id')
        except _WrongError as error:
            raise DataError(f"annotation file '{path}': {what} {index} ({shown(entry)}) {error}") from None
    texts = [entry['id'] for entry in entries if type(entry['id']) is str]
    if texts and len(texts) < len(entries):
        number = next(entry['id'] for entry in entries if type(entry['id']) is not str)
        raise DataError(
            f"annotation file '{path}': ids of {what} entries are partly numbers ({shown(number)}) and partly texts "
            f'({shown(texts[0])}): write all of them in one way, also in the annotations'
        )


def _check_objects(entries: list, path: str | os.PathLike, what: str) -> None:
    for index, entry in enumerate(entries):
        if not isinstance(entry, dict):
            raise DataError(
                f"annotation file '{path}': {what} {index} is {_describe(entry)}: it must be an object {{...}}"
            )


def _first_twice(values: Iterable) -> object:
    """The first value that comes twice; None if there is none."""
    return next((value for value, count in Counter(values).items() if count > 1), None)


def check_categories(categories: list, path: str | os.PathLike) -> list[dict]:
    """The categories, whose names are texts; see :func:`mmvim.datasets.annotations.class_names`."""
    _check_objects(categories, path, 'category')
    if not categories:
        raise DataError(f"annotation file '{path}' names no classes: every entry of 'categories' needs id and name")
    for category in categories:
        name = category.get('name')
        if not isinstance(name, str | int | float) or name == '' or not _is_text(str(name)):
            raise DataError(
                f"annotation file '{path}' names no classes: category {shown(category.get('id'))} has the name "
                f'{shown(name)}; every entry needs id and name'
            )
    _check_ids(categories, path, 'category')
    categories = [{**category, 'name': str(category['name'])} for category in categories]
    twice = _first_twice(category['name'] for category in categories)
    if twice is not None:
        raise DataError(f"annotation file '{path}' has two categories of the name {twice!r}: rename or merge them")
    twice = _first_twice(category['id'] for category in categories)
    if twice is not None:
        names = [category['name'] for category in categories if category['id'] == twice]
        raise DataError(
            f"annotation file '{path}': the categories {names} have the same id {shown(twice)}; ids must be unique"
        )
    return categories


def check_images(images: list, path: str | os.PathLike, repairs: Counter) -> list[dict]:
    """The images without repetitions, with whole numbers as sizes."""
    _check_objects(images, path, 'image')
    for key in ('id', 'file_name', 'height', 'width'):
        bare = next((image for image in images if image.get(key) is None), None)
        if bare is not None:
            raise DataError(
                f"annotation file '{path}': image entry {shown(bare)} has no '{key}'; add it to every image"
            )
    _check_ids(images, path, 'image')
    for image in images:
        try:
            _check_image(image, repairs)
        except _WrongError as error:
            raise DataError(f"annotation file '{path}': image {shown(image['id'])} has {error}") from None
    known: dict = {}
    for image in images:
        if known.setdefault(image['id'], image) != image:
            names = [shown(entry['file_name']) for entry in (known[image['id']], image)]
            raise DataError(
                f"annotation file '{path}': two images have the id {shown(image['id'])} ({' and '.join(names)}); "
                'ids must be unique'
            )
    if len(known) < len(images):
        repairs['images listed twice, taken once'] += len(images) - len(known)
    files = Counter(image['file_name'] for image in known.values())
    twice = [name for name, count in files.items() if count > 1]
    if twice:
        print_log(
            f"annotation file '{path}': {len(twice)} file names belong to several image ids, the first is {twice[0]!r}:"
            ' each id is an image of its own, with its annotations only; merge them if that is not meant',
            'current',
            30,
        )
    return list(known.values())


def _check_image(image: dict, repairs: Counter) -> None:
    name = image['file_name']
    if not isinstance(name, str) or not name.strip() or not _is_text(name):
        raise _WrongError(f'the file_name {shown(name)}: it must be the path of a file below the image folder')
    for key in ('height', 'width'):
        side = image[key]
        if type(side) is float and side.is_integer():
            image[key] = side = int(side)
            repairs['image sizes written as 1.0 taken as 1'] += 1
        if type(side) is not int or side < 1:
            raise _WrongError(f'the {key} {_describe(side)}: it must be a whole number of pixels from 1')
    if image['height'] * image['width'] >= LARGEST:
        raise _WrongError(
            f'height {shown(image["height"])} and width {shown(image["width"])}: {LARGEST} pixels or more cannot be '
            'read; correct the sizes or cut the image into tiles'
        )


class _Annotations:
    """The annotations of one file, checked one by one."""

    def __init__(self, content: dict, path: str | os.PathLike, with_masks: bool, repairs: Counter) -> None:
        self.entries, self.path, self.with_masks, self.repairs = content['annotations'], path, with_masks, repairs
        self.sizes = {image['id']: (image['height'], image['width']) for image in content['images']}
        self.categories = {category['id'] for category in content['categories']}
        self.compressed: list[tuple[int, str, int, int]] = []  # index, counts, height, width
        self.characters = 0  # of these
        self.astray: list[int] = []  # indices of masks that lie outside their boxes
        self.unlike: list[int] = []  # indices of masks with another extent than their boxes
        self.polygons = 0

    def check(self) -> None:
        total = len(self.entries)
        for index, entry in enumerate(self.entries):
            if total > CHUNK and index % CHUNK == 0:
                print_log(f"checking annotation file '{self.path}': {index} of {total} annotations", 'current')
            try:
                self._check_entry(entry, index)
            except _WrongError as error:
                self._refuse(index, f' {error}')
            except BadMaskError as error:
                self._refuse(index, f': {error}')
        self._check_compressed()
        self._report_astray()
        self._report_unlike()
        self._complete_ids()

    def _refuse(self, index: int, text: str) -> None:
        raise DataError(f"annotation file '{self.path}': {self._name(index)}{text}") from None

    def _name(self, index: int) -> str:
        entry = self.entries[index]
        number = entry.get('id') if isinstance(entry, dict) else None
        return f'the annotation at position {index}' if number is None else f'annotation {shown(number)}'

    def _check_entry(self, entry: object, index: int) -> None:
        if type(entry) is not dict:
            raise _WrongError(f'is {_describe(entry)}: it must be an object {{...}}')
        kind = next((kind for key, kind in FOREIGN.items() if key in entry and 'bbox' not in entry), None)
        if kind:
            raise _WrongError(f'is {kind}: export the data set for object detection, with a bbox for each object')
        self._check_reference(entry.get('image_id'), self.sizes, 'image_id', 'images')
        self._check_reference(entry.get('category_id'), self.categories, 'category_id', 'categories')
        height, width = self.sizes[entry['image_id']]
        box = entry.get('bbox')
        _check_box(box, height, width)
        for key in ('iscrowd', 'ignore'):
            flag = entry.get(key)
            if flag is not None and (type(flag) not in (int, float, bool) or flag not in FLAGS):
                raise _WrongError(f'has {key} {_describe(flag)}: it must be 0 or 1')
        entry['iscrowd'] = int(entry.get('iscrowd') or 0)
        area = entry.get('area')
        if area is not None and (type(area) not in NUMBERS or not abs(area) < LARGEST * REACH**2):
            raise _WrongError(f'has the area {_describe(area)}: it must be a finite number of pixels')
        if area is None or area <= 0:
            entry['area'] = box[2] * box[3]
            self.repairs['areas taken from the box'] += area is not None and entry['area'] > 0
        if self.with_masks and entry.get('segmentation'):
            self._check_mask(entry, index, height, width)

    @staticmethod
    def _check_reference(value: object, legal: Iterable, key: str, where: str) -> None:
        try:
            if type(value) is not bool and value in legal:
                return
        except TypeError:  # a list or an object
            pass
        if value is None:
            raise _WrongError(f'has no {key}: add it, with an id of {where!r}')
        other = next((known for known in legal if str(known) == str(value)), None)
        if other is None:
            raise _WrongError(f"has {key} {shown(value)}, which '{where}' does not list: correct or remove it")
        raise _WrongError(
            f"has {key} {_describe(value)}, '{where}' has the id {_describe(other)}: write both in one way, as a "
            'number or as a text'
        )

    def _check_mask(self, entry: dict, index: int, height: int, width: int) -> None:
        mask = entry['segmentation']
        if is_flat(mask):
            entry['segmentation'] = mask = [mask]
            self.repairs['polygons put into a list'] += 1
        if isinstance(mask, list):
            x0, y0, x1, y1 = check_polygons(mask, height, width)
            x, y, w, h = entry['bbox']
            self.polygons += 1
            if x0 > x + w + 1 or x1 < x - 1 or y0 > y + h + 1 or y1 < y - 1:
                self.astray.append(index)
            elif self.polygons <= SAMPLE and differs((x0, y0, x1 - x0, y1 - y0), entry['bbox']):
                self.unlike.append(index)
        elif not isinstance(mask, dict):
            raise _WrongError(
                f'has the segmentation {_describe(mask)}: it must be a list of polygons, or RLE with size and counts'
            )
        elif check_rle(mask, height, width):
            self.compressed.append((index, mask['counts'], height, width))
            self.characters += len(mask['counts'])
            if self.characters > BATCH:
                self._check_compressed()

    def _check_compressed(self) -> None:
        batch, self.compressed, self.characters = self.compressed, [], 0
        pixels = compressed_pixels([counts for _, counts, _, _ in batch])
        if pixels is None or any(p != h * w for p, (_, _, h, w) in zip(pixels, batch, strict=True)):
            for index, counts, height, width in batch:
                try:
                    check_compressed(counts, height, width)
                except BadMaskError as error:
                    self._refuse(index, f': {error}')

    def _complete_ids(self) -> None:
        """Number the annotations where their ids do not: COCOeval takes 0 for "no match", and needs numbers."""
        ids = [entry.get('id') for entry in self.entries]
        if set(map(type, ids)) <= {int} and len(set(ids)) == len(ids) and 0 < min(ids, default=1):
            return
        if any(number is not None for number in ids):
            self.repairs['annotations numbered anew, as their ids are not unique numbers above 0'] += len(ids)
        for number, entry in enumerate(self.entries, 1):
            entry['id'] = number

    def _report_astray(self) -> None:
        if not self.astray:
            return
        first = self.astray[0]
        text = (
            f"annotation file '{self.path}': the masks of {len(self.astray)} annotations lie outside their boxes, the "
            f'first is {self._name(first)} with bbox {shown(self.entries[first]["bbox"])} and segmentation '
            f'{shown(self.entries[first]["segmentation"])}: check the order and unit of coordinates (pixels)'
        )
        if 2 * len(self.astray) > self.polygons:
            raise DataError(text)
        print_log(text, 'current', 30)

    def _report_unlike(self) -> None:
        compared = min(self.polygons, SAMPLE)
        if 2 * len(self.unlike) <= compared:
            return
        first = self.entries[self.unlike[0]]
        print_log(
            f"annotation file '{self.path}': {len(self.unlike)} of {compared} masks match their boxes by less "
            f'than half, the first is {self._name(self.unlike[0])} with bbox {shown(first["bbox"])} and segmentation '
            f'{shown(first["segmentation"])}: a bbox is (x, y, width, height), x and y are its upper left corner',
            'current',
            30,
        )


def _check_box(box: object, height: int, width: int) -> None:
    if type(box) is not list or len(box) != 4 or not NUMBERS.issuperset(map(type, box)):
        raise _WrongError(f'has no bbox of four numbers (x, y, width, height), but {shown(box)}')
    x, y, w, h = box
    reach = REACH * max(height, width)
    if not (-reach <= x <= reach and -reach <= y <= reach and w <= 2 * reach and h <= 2 * reach):
        raise _WrongError(
            f'has the bbox {shown(box)}, which is not finite or more than {REACH} sides away from its image of '
            f'{height} rows and {width} columns: correct or remove it'
        )
    if not (w >= 0 and h >= 0):
        raise _WrongError(f'has the bbox {shown(box)} of negative size: it must be (x, y, width, height)')


def check_annotations(content: dict, path: str | os.PathLike, with_masks: bool, repairs: Counter) -> None:
    """Check and complete the annotations of a file; see :func:`mmvim.datasets.annotations.read_annotations`."""
    _Annotations(content, path, with_masks, repairs).check()
