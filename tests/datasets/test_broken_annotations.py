"""Broken annotation files end in one line before training; odd ones that are legal train.

Each row spoils a good file in one place, for every field and every kind of wrong value.
"""

import gzip
import json
import math
import os
import socket

import cv2
import numpy as np
import pytest
from mmdet.registry import DATASETS
from mmengine.logging import MMLogger
from mmengine.registry import DefaultScope
from pycocotools import mask as rle_tools

import mmvim.datasets.coco  # noqa: F401
from mmvim.datasets.masks import check_compressed, compressed_pixels
from mmvim.errors import DataError

HEIGHT, WIDTH = 40, 50
PIPELINE = [dict(type='mmvim.LoadImageFromFile'), dict(type='LoadAnnotations', with_bbox=True, with_mask=True)]
SQUARE = [[2.0, 2.0, 10.0, 2.0, 10.0, 10.0, 2.0, 10.0]]
BITS = np.zeros((HEIGHT, WIDTH), np.uint8)
BITS[2:10, 2:10] = BITS[5, 4] = 1
RLE = {'size': [HEIGHT, WIDTH], 'counts': rle_tools.encode(np.asfortranarray(BITS))['counts'].decode()}
RUNS = {'size': [HEIGHT, WIDTH], 'counts': [82, 8, *[32, 8] * 7, 1630]}
HUGE = 10**400


@pytest.fixture(autouse=True)
def mmdet_scope():
    with DefaultScope.overwrite_default_scope('mmdet'):
        yield


@pytest.fixture(scope='module')
def home(tmp_path_factory):
    root = tmp_path_factory.mktemp('coco')
    (root / 'images').mkdir()
    for name in ('1.jpg', '2.jpg'):
        cv2.imwrite(str(root / 'images' / name), np.full((HEIGHT, WIDTH, 3), 90, np.uint8))
    return root


def good():
    images = [dict(id=i, file_name=f'{i}.jpg', height=HEIGHT, width=WIDTH) for i in (1, 2)]
    categories = [dict(id=7, name='fig'), dict(id=3, name='date')]
    annotations = [
        dict(id=10 + i, image_id=1 + i % 2, category_id=7 - 4 * (i // 2), bbox=[2, 2 + i, 8, 8], area=64, iscrowd=0)
        for i in range(4)
    ]
    for entry in annotations:
        entry['segmentation'] = [list(SQUARE[0])]
    return dict(images=images, annotations=annotations, categories=categories)


def build(home, content, **settings):
    text = content if isinstance(content, str | bytes) else json.dumps(content)
    (home / 'a.json').write_bytes(text if isinstance(text, bytes) else text.encode())
    prefix, settings = dict(img='images'), {'pipeline': PIPELINE, **settings}
    return DATASETS.build(
        dict(type='mmvim.CocoFolderDataset', data_root=str(home), ann_file='a.json', data_prefix=prefix, **settings)
    )


def spoilt(where, key, value, index=1):
    content = good()
    content[where][index][key] = value
    return content


def changed(**changes):
    content = good()
    for entry in content['annotations']:
        entry.update(changes)
    return content


def added(where, entry):
    content = good()
    content[where].append(entry)
    return content


def without(where, key):
    content = good()
    del content[where][1][key]
    return content


def with_mask(value):
    return spoilt('annotations', 'segmentation', value)


def with_rle(value=RLE, **changes):
    return with_mask({**value, **changes})


# label: (content, what the message must say besides the file)
WRONG_TYPES = [True, None, [1], {'a': 1}, math.nan, math.inf, -math.inf, 1.5]
NO_TEXTS = ['a\0b', 'a\ud800']
BROKEN = {
    **{f'image id {v}': (spoilt('images', 'id', v), "image .*'id'|image 1 .*has the id") for v in WRONG_TYPES},
    **{f'image height {v}': (spoilt('images', 'height', v), 'height') for v in [*WRONG_TYPES, '40', 0, -4, HUGE]},
    **{f'image width {v}': (spoilt('images', 'width', v), 'width') for v in [*WRONG_TYPES, '', 10**9]},
    **{
        f'file_name {v}': (spoilt('images', 'file_name', v), 'file_name')
        for v in [*WRONG_TYPES, 7, '', ' ', 'a\0b', 'a\ud800']
    },
    **{f'category id {v}': (spoilt('categories', 'id', v), 'category 1 .*has the id') for v in [*WRONG_TYPES, HUGE]},
    **{
        f'name {v}': (spoilt('categories', 'name', v), 'category 3 has the name')
        for v in [None, '', [], {'a': 1}, 'a\0b', 'a\ud800']
    },
    **{
        f'{key} {v}': (spoilt('annotations', key, v), f'annotation 11 has (no )?{key}')
        for key in ('image_id', 'category_id')
        for v in [*WRONG_TYPES, 99, -1, HUGE, '', 'x']
    },
    **{f'image_id text {v}': (spoilt('annotations', 'image_id', v), "the text '2'.* has the id 2: w") for v in ['2']},
    **{
        f'bbox {v}': (spoilt('annotations', 'bbox', v), 'annotation 11 has (no|the) bbox')
        for v in [None, 1, '1,2,3,4', [], [1, 2], [1, 2, 3, 4, 5], {'x': 1}, [1, 2, 3, '4'], [1, 2, None, 4]]
        + [[1, 2, [3], 4], [True, 1, 2, 3], [math.nan, 1, 2, 3], [1, 2, 3, math.inf], [1, 2, -3, 4], [1, 1, HUGE, 2]]
        + [[1, 2, 3, 1e30], [-1e9, 2, 3, 4]]
    },
    **{
        f'area {v}': (spoilt('annotations', 'area', v), 'annotation 11 has the area')
        for v in [True, [1], {'a': 1}, '64', math.nan, math.inf, -math.inf, HUGE]
    },
    **{
        f'{key} {v}': (spoilt('annotations', key, v), f'annotation 11 has {key}')
        for key in ('iscrowd', 'ignore')
        for v in ['0', 'false', 2, -1, [1], {'a': 1}, math.nan, 0.5, HUGE]
    },
    **{
        f'mask {v!s:.30}': (with_mask(v), r'annotation 11[: ]|1 of 4 annotations have no .segmentation. \(.* id 11')
        for v in [
            None,
            [],
            {},
            'x',
            5,
            True,
            [[]],
            [[1, 2, 3, 4]],
            [[1, 2, 3, 4, 5, 6, 7]],
            [1, 2, 3, 4],
            [[[1, 2] * 3]],
        ]
        + [[[1, 2, 3, 4, 5, '6']], [[1, 2, 3, 4, 5, None]], [[True] * 6], [[1, 2, 3, math.nan, 5, 6]]]
        + [[SQUARE, 3], [[math.nan, 2, 3, 4, 5, 6]], [[1, 2, 3, math.inf, 5, 6]], [[1, 2, 3, 1e9, 5, 6]]]
        + [[[1, 2, 3, HUGE, 5, 6]], [*SQUARE, [1, 2, 3, 4]], [{'x': 1}], [*SQUARE, 'x'], [1, 2, 3, 4, 5]]
    },
    'RLE size swapped': (with_rle(size=[WIDTH, HEIGHT]), r'annotation 11: RLE size \[50, 40\].*order is height, width'),
    **{
        f'RLE size {v}': (with_rle(size=v), 'RLE size')
        for v in [None, [40], 40, '40,50', [0, 0], [-40, -50], [40.0, 50]]
    },
    **{f'RLE size {v}': (with_rle(size=v), 'RLE size') for v in [[40, 51], [2**31, 2**31], [HUGE, 1]]},
    **{f'RLE size {v}': (with_rle(size=v), 'RLE size') for v in [[True, 50], [-40, -50], [40.0, 50]]},
    **{
        f'RLE counts {v!s:.20}': (with_rle(counts=v), 'annotation 11: RLE counts')
        for v in [None, 5, '', ' ', 'é', '\0', RLE['counts'][:-2], RLE['counts'] + 'P', f"b'{RLE['counts']}'", 'zzzz']
        + [
            'P' * 9,
            'o' * 5000,
            RLE['counts'] * 2,
            [],
            [2001],
            [1, 2],
            [-1, 2001],
            [2000.0],
            ['2000'],
            [None],
            [True, 1999],
        ]
        + [[HUGE], [2**32 + 2000], [[2000]]]
    },
    'RLE without counts': (with_mask({'size': [HEIGHT, WIDTH]}), 'RLE counts None'),
    'RLE without size': (with_mask({'counts': RLE['counts']}), 'RLE size None'),
    'all masks elsewhere': (
        changed(segmentation=[[40, 30, 45, 30, 45, 35]]),
        'the masks of 4 annotations lie outside their boxes, the first is annotation 10',
    ),
    **{f'no {k} of images': (without('images', k), f"has no '{k}'") for k in ('file_name', 'height', 'width', 'id')},
    **{f'no {k} of annotations': (without('annotations', k), k) for k in ('image_id', 'category_id', 'bbox')},
    **{f'no {k} of categories': (without('categories', k), 'id') for k in ('id', 'name')},
    'two images, one id': (spoilt('images', 'id', 1), r"two images have the id 1 \('1.jpg' and '2.jpg'\)"),
    'ids as number and text': (spoilt('images', 'id', '2'), r"partly numbers \(1\) and partly texts \('2'\)"),
    'two categories, one id': (spoilt('categories', 'id', 7), r"\['fig', 'date'\] have the same id 7"),
    'two categories, one name': (spoilt('categories', 'name', 'fig'), "two categories of the name 'fig'"),
    '1 and "1"': (
        {**good(), 'categories': [dict(id=7, name=1), dict(id=3, name='1')]},
        "two categories of the name '1'",
    ),
    **{
        f'{where} {v}': ({**good(), where: v}, f"no list \\['{where}'\\]")
        for where in ('images', 'annotations', 'categories')
        for v in (None, {}, 'x', 3)
    },
    **{
        f'{where} with {v}': ({**good(), where: [*good()[where], v]}, f'{where[:5]}.*must be an object')
        for where in ('images', 'annotations')
        for v in (None, 3, 'x', [1])
    },
    'categories with a name alone': ({**good(), 'categories': ['fig']}, "category 0 is the text 'fig'"),
    'no images': ({**good(), 'images': [], 'annotations': []}, 'lists no images'),
    'no categories': ({**good(), 'categories': []}, 'names no classes'),
    'no annotations': ({**good(), 'annotations': []}, 'has no annotations: there is nothing to learn'),
    'top-level list': ([good()], 'has no list'),
    'text': ('no JSON', 'is not JSON'),
    'empty': ('', 'is empty'),
    'blank': (' \n', 'is empty'),
    'cut off': (json.dumps(good())[:-9], 'is not JSON'),
    'lines': ('{"images": []}\n{"images": []}\n', r'one object per line\?'),
    'nesting': ('[' * 200_000, 'nested too deeply'),
    'nesting of objects': ('{"a":' * 200_000, 'nested too deeply'),
    'digits': (json.dumps(good()).replace('64', '6' * 9999, 1), 'is not JSON'),
    'key twice': (json.dumps(good())[:-1] + ', "images": []}', "has the key 'images' twice"),
    'Latin-1': (json.dumps(good()).replace('fig', 'f\xefg').encode('latin-1'), 'is not utf-8.*save it as UTF-8'),
    'binary': (bytes(range(256)), 'a.json'),
    'gzip': (gzip.compress(b'{}'), 'packed by gzip'),
    '1e400': (json.dumps(good()).replace('[2, 3, 8, 8]', '[2, 1e400, 8, 8]'), 'annotation 11 has the bbox'),
    'fractions': (
        {
            **good(),
            'annotations': [{**a, 'bbox': [0, 0.1, 0.5, 0.5], 'segmentation': None} for a in good()['annotations']],
        },
        'boxes in fractions of the image',
    ),
    **{
        f'all {label}': (
            changed(**change),
            f'leaves nothing to learn from: its 4 annotations are 4 {label}',
        )
        for label, change in {
            'crowd regions': dict(iscrowd=1),
            'marked to be ignored': dict(ignore=True),
            'narrower than a pixel': dict(bbox=[5, 5, 0.5, 8]),
            'outside their images': dict(bbox=[60, 5, 8, 8], segmentation=[[60, 5, 68, 5, 68, 13]]),
        }.items()
    },
}


@pytest.mark.parametrize('label', BROKEN)
def test_one_line_names_what_is_wrong(home, label):
    content, message = BROKEN[label]
    with pytest.raises(DataError, match=message) as raised:
        build(home, content)
    text = str(raised.value)
    assert 'a.json' in text and '\n' not in text and len(text) < 600


def test_there_are_enough_rows():
    assert len(BROKEN) > 200


def numbered(content, ids):
    for entry, number in zip(content['annotations'], ids, strict=True):
        entry['id'] = number
    return content


def as_texts(content):
    for entry in [*content['images'], *content['categories']]:
        entry['id'] = f'x{entry["id"]}'
    for entry in content['annotations']:
        entry['image_id'], entry['category_id'] = f'x{entry["image_id"]}', f'x{entry["category_id"]}'
    return content


def as_floats(content):
    return json.loads(json.dumps(content), parse_int=float)


LEGAL = {
    'good': good(),
    'byte order mark': b'\xef\xbb\xbf' + json.dumps(good()).encode(),
    'UTF-16': json.dumps(good()).encode('utf-16'),
    'names beyond ASCII': json.dumps(spoilt('categories', 'name', '日本 ü')),
    'name with blanks': spoilt('categories', 'name', ' a b '),
    **{f'name {v}': spoilt('categories', 'name', v) for v in (1, 0, -2.5, True, False)},
    'ids as texts': as_texts(good()),
    'every number with a point': as_floats(good()),
    **{f'annotation ids {v}': numbered(good(), v) for v in ([0, 1, 2, 3], [5] * 4, [None] * 4, [1, '1', 2, 3])},
    'annotation ids of any type': numbered(good(), [[1], {}, 1.5, HUGE]),
    **{f'iscrowd {v}': spoilt('annotations', 'iscrowd', v) for v in (None, True, False, 0.0, 1)},
    **{f'area {v}': spoilt('annotations', 'area', v) for v in (None, 0, -64, 1e-3)},
    **{f'no {key}': without('annotations', key) for key in ('id', 'area', 'iscrowd')},
    'flat polygon': with_mask(SQUARE[0]),
    'polygon beyond the image': with_mask([[-5, -5, 70, 0, 70.5, 60]]),
    'polygon on a line': with_mask([[2, 2, 5, 5, 8, 8]]),
    'two polygons': with_mask([*SQUARE, [1, 1, 3, 1, 3, 3]]),
    'compressed RLE': with_rle(),
    'RLE': with_mask(RUNS),
    'RLE of nothing': with_rle(RUNS, counts=[HEIGHT * WIDTH]),
    'RLE of all': with_rle(RUNS, counts=[0, HEIGHT * WIDTH]),
    'RLE with empty runs': with_rle(RUNS, counts=[100, 0, 0, 0, 1900]),
    'box beyond the image': spoilt('annotations', 'bbox', [-3, -4, 80, 70]),
    'box without area': spoilt('annotations', 'bbox', [2, 2, 0, 8]),
    'box outside': spoilt('annotations', 'bbox', [60, 2, 8, 8]),
    'small box without mask': added(
        'annotations', {**good()['annotations'][0], 'bbox': [1, 1, 0, 0], 'segmentation': []}
    ),
    'image listed twice': added('images', good()['images'][0]),
    'image without annotations': {**good(), 'annotations': [a for a in good()['annotations'] if a['image_id'] == 1]},
    'one file, two ids': spoilt('images', 'file_name', '1.jpg'),
    'keys of other tools': {**spoilt('images', 'x', [1]), 'info': None, 'licenses': {}, 'videos': []},
}


@pytest.mark.parametrize('label', LEGAL)
def test_odd_files_train(home, label):
    dataset = build(home, LEGAL[label])
    assert len(dataset) == 2
    samples = [dataset[i] for i in range(2)]
    labels = [label for sample in samples for label in sample['gt_bboxes_labels']]
    assert len(labels) >= 2 and set(labels) <= {0, 1}
    for sample in samples:
        assert sample['gt_masks'].masks.shape[1:] == (HEIGHT, WIDTH)


def test_repairs_are_logged_with_a_count(home, caplog):
    MMLogger.get_current_instance().addHandler(caplog.handler)
    content = spoilt('annotations', 'area', -3)
    content['annotations'][2]['segmentation'] = SQUARE[0]
    content['annotations'].append({**content['annotations'][0], 'id': 10, 'iscrowd': 1})
    build(home, numbered(content, [1, 2, 3, 4, 4]))
    text = caplog.text
    assert '1 areas taken from the box, 1 polygons put into a list, 5 annotations numbered anew' in text
    assert '4 of 5 annotations are trained on, left out: 1 crowd regions' in text
    assert any(record.levelname == 'WARNING' and 'left out' in record.message for record in caplog.records)
    MMLogger.get_current_instance().removeHandler(caplog.handler)


@pytest.mark.parametrize(
    'boxes, warns', [([[20, 15, 45, 38], [5, 30, 40, 39]] * 2, True), ([[2, 2, 8, 8], [20, 20, 30, 20]] * 2, False)]
)
def test_corners_in_place_of_sizes_are_suspected(home, caplog, boxes, warns):
    MMLogger.get_current_instance().addHandler(caplog.handler)
    content = good()
    for entry, box in zip(content['annotations'], boxes, strict=True):
        entry['bbox'] = box
    build(home, content, pipeline=[])
    assert ('would fit as corners' in caplog.text) == warns
    MMLogger.get_current_instance().removeHandler(caplog.handler)


@pytest.mark.parametrize(
    'edit, expected',
    [
        (lambda a: a.update(bbox=[6, 6, 8, 8]), '4 of 4 masks match their boxes by less than half, the first is'),
        (lambda a: a.update(segmentation=[[2, 6, 10, 6, 2, 6]]), '4 of 4 masks match'),
        (lambda a: a['bbox'].__setitem__(2, 9), ''),
        (lambda a: a.update(category_id=7), "has no annotation of ['date'], they are not learnt"),
    ],
    ids=['centres', 'without an area', 'larger box', 'a class without annotations'],
)
def test_what_looks_wrong_is_a_warning(home, caplog, edit, expected):
    content = good()
    for entry in content['annotations']:
        edit(entry)
    MMLogger.get_current_instance().addHandler(caplog.handler)
    build(home, content)
    MMLogger.get_current_instance().removeHandler(caplog.handler)
    warnings = [record.message for record in caplog.records if record.levelname == 'WARNING']
    assert len(warnings) == bool(expected) and expected in ''.join(warnings)


def test_a_supercategory_that_is_listed_as_a_class_is_named(home, caplog):
    MMLogger.get_current_instance().addHandler(caplog.handler)
    content = good()
    for category in content['categories']:
        category['supercategory'] = 'fruits'
    content['categories'].insert(0, dict(id=0, name='fruits', supercategory=['none']))
    build(home, content)
    assert "['fruits'], they are not learnt; 'fruits' is the supercategory of others" in caplog.text
    MMLogger.get_current_instance().removeHandler(caplog.handler)


@pytest.mark.parametrize('entry, kind', [(dict(segments_info=[]), 'a panoptic file'), (dict(caption='x'), 'a caption')])
def test_annotations_of_another_task_are_named(home, entry, kind):
    with pytest.raises(DataError, match=f'is (that of )?{kind}: export .* for object detection'):
        build(home, {**good(), 'annotations': [dict(id=1, image_id=1, **entry)]})


def test_broken_masks_do_not_matter_to_boxes(home):
    assert len(build(home, with_rle(counts='zzz'), pipeline=[PIPELINE[0], dict(type='LoadAnnotations')])) == 2


def test_polygons_alone_are_asked_for(home):
    pipeline = [PIPELINE[0], dict(type='LoadAnnotations', with_mask=True, poly2mask=False)]
    with pytest.raises(DataError, match=r'1 of 4 masks are RLE \(the first has id 11\).*set poly2mask=True'):
        build(home, with_rle(), pipeline=pipeline)


def irregular_file(path, kind):
    if kind == 'pipe':
        os.mkfifo(path)
    elif kind == 'socket':
        with socket.socket(socket.AF_UNIX) as unix:
            home = os.open(path.parent, os.O_RDONLY)
            unix.bind(f'/proc/self/fd/{home}/{path.name}')  # the path itself may be too long
            os.close(home)
    elif kind == 'folder':
        path.mkdir()
    else:
        path.symlink_to('/dev/zero')


@pytest.mark.parametrize('kind', ['pipe', 'socket', 'folder', 'device'])
def test_nothing_waits_for_a_file_that_is_none(home, tmp_path, kind):
    irregular_file(tmp_path / 'x.json', kind)
    settings = dict(type='mmvim.CocoFolderDataset', data_root=str(home), data_prefix=dict(img='images'))
    with pytest.raises(DataError, match=rf"x\.json' is a {kind}: name a JSON file"):
        DATASETS.build(dict(settings, ann_file=str(tmp_path / 'x.json')))
    irregular_file(home / 'images' / f'{kind}.jpg', kind)
    with pytest.raises(DataError, match=rf"{kind}\.jpg' of .* is a {kind}: correct its file_name"):
        build(home, spoilt('images', 'file_name', f'{kind}.jpg'), images_outside=True)
    assert (
        len(build(home, spoilt('images', 'file_name', f'{kind}.jpg'), images_outside=True, skip_bad_images=True)) == 1
    )


@pytest.mark.parametrize('name', ['../secret.jpg', '{root}/secret.jpg', 'folder/../secret.jpg', 'x/../../secret.jpg'])
def test_images_outside_their_folder_are_followed_only_if_asked_for(tmp_path, name):
    images = tmp_path / 'images'
    (images / 'x').mkdir(parents=True)
    for path in (images / '1.jpg', tmp_path / 'secret.jpg'):
        cv2.imwrite(str(path), np.full((HEIGHT, WIDTH, 3), 90, np.uint8))
    (images / 'folder').symlink_to(tmp_path / 'y')
    (tmp_path / 'y').mkdir()
    content = spoilt('images', 'file_name', name.format(root=tmp_path))
    with pytest.raises(DataError, match=r"secret\.jpg', outside the image folder .* set images_outside=True"):
        build(tmp_path, content)
    assert len(build(tmp_path, content, images_outside=True)) == 2


@pytest.mark.parametrize('name', ['{root}/images/2.jpg', './2.jpg', '../images/2.jpg', 'inner.jpg'])
def test_images_inside_may_be_named_in_any_way(home, name):
    if not (home / 'images' / 'inner.jpg').exists():
        (home / 'images' / 'inner.jpg').symlink_to('2.jpg')
    assert len(build(home, spoilt('images', 'file_name', name.format(root=home)))) == 2


@pytest.mark.parametrize('name', ['link.jpg', 'folder/3.jpg'])
def test_links_in_the_image_folder_are_followed_wherever_they_lead(tmp_path, name):
    (tmp_path / 'images').mkdir()
    (tmp_path / 'elsewhere').mkdir()
    for path in (tmp_path / 'images' / '1.jpg', tmp_path / 'elsewhere' / '3.jpg'):
        cv2.imwrite(str(path), np.full((HEIGHT, WIDTH, 3), 90, np.uint8))
    (tmp_path / 'images' / 'link.jpg').symlink_to(tmp_path / 'elsewhere' / '3.jpg')
    (tmp_path / 'images' / 'folder').symlink_to(tmp_path / 'elsewhere')
    assert len(build(tmp_path, spoilt('images', 'file_name', name))) == 2


def test_compressed_masks_are_read_as_pycocotools_reads_them():
    rng, masks, pixels = np.random.default_rng(0), [], []
    for _ in range(200):
        height, width = rng.integers(1, 400, 2)
        bits = np.asfortranarray(rng.random((height, width)) < rng.choice([0, 0.001, 0.5, 1]), np.uint8)
        masks.append(rle_tools.encode(bits)['counts'].decode())
        pixels.append(height * width)
        check_compressed(masks[-1], int(height), int(width))
    assert compressed_pixels(masks).tolist() == pixels
