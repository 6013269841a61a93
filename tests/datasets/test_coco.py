import json
import shutil

import cv2
import numpy as np
import pytest
import torch
from mmdet.registry import DATASETS, METRICS, TRANSFORMS
from mmengine.dataset import Compose
from mmengine.registry import DefaultScope

import mmvim.datasets.coco  # noqa: F401
from mmvim.datasets.annotations import read_annotations
from mmvim.datasets.transforms import decode_image
from mmvim.errors import DataError

PIPELINE = [dict(type='mmvim.LoadImageFromFile'), dict(type='LoadAnnotations', with_bbox=True, with_mask=True)]
SQUARE = [[2.0, 2.0, 10.0, 2.0, 10.0, 10.0, 2.0, 10.0]]


@pytest.fixture(autouse=True)
def mmdet_scope():
    with DefaultScope.overwrite_default_scope('mmdet'):
        yield


def annotation(image_id, category_id, **changes):
    whole = dict(
        id=image_id * 10 + category_id,
        image_id=image_id,
        category_id=category_id,
        bbox=[2, 2, 8, 8],
        area=64,
        iscrowd=0,
        segmentation=SQUARE,
    )
    return {**whole, **changes}


def write(root, name, sizes, annotations, categories):
    """A COCO folder; sizes: (height, width) of the images."""
    (root / 'images').mkdir(exist_ok=True)
    images = []
    for number, (height, width) in enumerate(sizes, 1):
        picture = np.random.default_rng(number).integers(0, 255, (height, width, 3), dtype=np.uint8)
        file_name = f'{name}{number}.jpg'
        cv2.imwrite(str(root / 'images' / file_name), picture)
        images.append(dict(id=number, file_name=file_name, height=height, width=width))
    content = dict(images=images, annotations=annotations, categories=categories)
    (root / f'{name}.json').write_text(json.dumps(content))
    return content


@pytest.fixture
def folder(tmp_path):
    fig, date, nut = dict(id=7, name='fig'), dict(id=3, name='date'), dict(id=11, name='nut')
    write(tmp_path, 'train', [(40, 50)] * 2, [annotation(1, 7), annotation(1, 3), annotation(2, 11)], [fig, date, nut])
    write(tmp_path, 'val', [(40, 50)], [annotation(1, 3), annotation(1, 11)], [nut, date])
    return tmp_path


def build(folder, split='train', **settings):
    return DATASETS.build(
        dict(
            type='mmvim.CocoFolderDataset',
            data_root=str(folder),
            ann_file=f'{split}.json',
            data_prefix=dict(img='images'),
            **{'pipeline': PIPELINE, **settings},
        )
    )


def change(folder, edit, split='train'):
    path = folder / f'{split}.json'
    content = json.loads(path.read_text())
    edit(content)
    path.write_text(json.dumps(content))


def test_class_names_come_from_the_file_in_its_order(folder):
    dataset = build(folder)
    assert dataset.metainfo['classes'] == ('fig', 'date', 'nut')
    assert [[i['bbox_label'] for i in dataset.get_data_info(n)['instances']] for n in range(2)] == [[0, 1], [2]]
    assert dataset[0]['gt_masks'].masks.shape == (2, 40, 50)


def test_a_split_with_other_order_and_fewer_classes_gets_the_same_labels(folder):
    dataset = build(folder, 'val', metainfo=dict(classes=('fig', 'date', 'nut')))
    assert [i['bbox_label'] for i in dataset.get_data_info(0)['instances']] == [1, 2]


def test_a_class_that_the_model_does_not_know_is_refused(folder):
    with pytest.raises(DataError, match=r"val.json' has classes \['nut'\] that the model does not know"):
        build(folder, 'val', metainfo=dict(classes=('fig', 'date')))


def prediction(dataset, label, box):
    sample = dataset.get_data_info(0)
    instances = dict(bboxes=torch.tensor([box]), scores=torch.tensor([0.9]), labels=torch.tensor([label]))
    return dict(img_id=sample['img_id'], ori_shape=(40, 50), pred_instances=instances)


def test_the_metric_looks_categories_up_by_name(folder):
    dataset = build(folder, 'val', metainfo=dict(classes=('fig', 'date', 'nut')), test_mode=True)
    metric = METRICS.build(dict(type='mmvim.CocoFolderMetric', metric='bbox'))
    metric.dataset_meta = dataset.metainfo
    box = [2.0, 2.0, 10.0, 10.0]
    for label, expected in ((1, 0.5), (2, 0.5), (0, 0.0)):
        metric.process({}, [prediction(dataset, label, box)])
        assert metric.evaluate(1)['coco/bbox_mAP_50'] == pytest.approx(expected, abs=1e-3)


def test_keys_that_exporters_leave_out_are_filled_in(folder):
    def strip(content):
        for entry in content['annotations']:
            del entry['id'], entry['area'], entry['iscrowd']

    change(folder, strip)
    content = read_annotations(folder / 'train.json')
    assert [(a['id'], a['area'], a['iscrowd']) for a in content['annotations']] == [(1, 64, 0), (2, 64, 0), (3, 64, 0)]
    assert len(build(folder)) == 2


@pytest.mark.parametrize(
    'text, message',
    [
        ('{"images": [', r"train.json' is not JSON"),
        ('[]', r"train.json' has no list \['images', 'annotations', 'categories'\]"),
        ('{"annotations": [], "categories": []}', r"train.json' has no list \['images'\]"),
        ('{"images": [], "annotations": [], "categories": [{"id": 1, "name": "a"}]}', "train.json' lists no images"),
        ('{"images": [{}], "annotations": [], "categories": []}', "train.json' names no classes"),
    ],
)
def test_files_that_are_no_annotations_are_refused(folder, text, message):
    (folder / 'train.json').write_text(text)
    with pytest.raises(DataError, match=message):
        build(folder)


@pytest.mark.parametrize(
    'edit, message',
    [
        (lambda c: c['annotations'][0].update(category_id=99), "has category_id 99, which 'categories' does not list"),
        (lambda c: c['annotations'][0].update(image_id=99), "has image_id 99, which 'images' does not list"),
        (lambda c: c['annotations'][0].update(bbox=[1, 2]), 'has no bbox of four numbers'),
        (lambda c: c['annotations'][1].update(segmentation=[]), "1 of 3 annotations have no 'segmentation'"),
        (lambda c: c['images'][0].pop('height'), "has no 'height'"),
        (lambda c: c['images'][1].update(id=1), 'two images have the id 1'),
        (lambda c: c['categories'][1].update(name='fig'), "two categories of the name 'fig'"),
        (lambda c: c['images'][0].update(file_name='gone.jpg'), r'1 of 2 images .* do not exist.*gone\.jpg'),
    ],
)
def test_wrong_entries_are_named(folder, edit, message):
    change(folder, edit)
    with pytest.raises(DataError, match=message):
        build(folder)


def test_boxes_without_masks_are_fine_for_a_box_detector(folder):
    change(folder, lambda c: [entry.pop('segmentation') for entry in c['annotations']])
    assert len(build(folder, pipeline=[PIPELINE[0], dict(type='LoadAnnotations', with_bbox=True)])) == 2


@pytest.mark.parametrize(
    'settings, message',
    [
        (dict(data_root='nowhere'), "data folder 'nowhere' does not exist: set data_root"),
        (dict(ann_file='other.json'), "other.json' does not exist"),
        (dict(ann_file=''), 'no annotation file: set train_ann'),
        (dict(data_prefix=dict(img='pictures')), "image folder '.*pictures' does not exist: set train_img"),
    ],
)
def test_missing_files_are_named(folder, settings, message):
    whole = dict(
        type='mmvim.CocoFolderDataset', data_root=str(folder), ann_file='train.json', data_prefix=dict(img='images')
    )
    with pytest.raises(DataError, match=message):
        DATASETS.build({**whole, **settings})


@pytest.mark.parametrize(
    'stored, named, hint',
    [
        ('1.JPG', '1.jpg', "'1.JPG' does"),
        ('1.png', '1.jpg', "'1.png' does"),
        ('a b.jpg', 'a%20b.jpg', "'a b.jpg' does"),
        ('1.jpg', '1.jpg ', "'1.jpg' does"),
        ('1.jpg', '1', "'1.jpg' does"),
        ('1.jpg', 'images/1.jpg', 'nor does its folder'),
        ('\u00e9.jpg', 'e\u0301.jpg', r"'\xe9.jpg' does"),
        ('e\u0301.jpg', '\u00e9.jpg', r"'e\u0301.jpg' does"),
    ],
)
def test_a_missing_image_of_a_similar_name_is_named(folder, stored, named, hint):
    (folder / 'images' / 'train1.jpg').rename(folder / 'images' / stored)
    change(folder, lambda content: content['images'][0].update(file_name=named))
    with pytest.raises(DataError, match='1 of 2 images .* do not exist') as raised:
        build(folder)
    assert hint in str(raised.value)


def spoil(path, how):
    data = path.read_bytes()
    path.write_bytes({'empty': b'', 'text': b'not an image', 'truncated': data[: len(data) // 2]}[how])


@pytest.mark.parametrize('how', ['empty', 'text', 'truncated'])
def test_a_bad_image_is_named_or_left_out_when_asked(folder, how):
    spoil(folder / 'images' / 'train1.jpg', how)
    dataset = build(folder)
    with pytest.raises(DataError, match=r"image '.*train1\.jpg' cannot be read .*skip_bad_images=True"):
        dataset[0]
    skipping = build(folder, skip_bad_images=True)
    assert [skipping.get_data_info(i)['img_path'][-10:] for i in range(len(skipping))] == ['train2.jpg']


@pytest.mark.parametrize('suffix', ['.png', '.jpg', '.bmp', '.webp'])
def test_truncation_is_noticed_in_every_format(suffix):
    picture = np.random.default_rng(0).integers(0, 255, (64, 64, 3), dtype=np.uint8)
    data = cv2.imencode(suffix, picture)[1].tobytes()
    assert decode_image(data, 'x').shape == (64, 64, 3)
    assert decode_image(data + b'\0\0\n', 'x').shape == (64, 64, 3)
    with pytest.raises(DataError, match="image 'x' cannot be read"):
        decode_image(data[: len(data) * 3 // 4], 'x')


def test_all_images_bad_is_an_error_even_when_skipping(folder):
    for path in (folder / 'images').glob('train*'):
        spoil(path, 'text')
    with pytest.raises(DataError, match='none of the 2 images'):
        build(folder, skip_bad_images=True)


def test_an_image_of_another_size_than_its_annotations_is_refused(folder):
    change(folder, lambda c: c['images'][0].update(height=50, width=40))
    with pytest.raises(DataError, match='has 40 rows and 50 columns, its annotations are for 50 rows and 40 columns'):
        build(folder)[0]
    assert len(build(folder, skip_bad_images=True)) == 1


def test_a_missing_image_at_run_time_is_named(folder):
    dataset = build(folder)
    shutil.rmtree(folder / 'images')
    with pytest.raises(DataError, match=r"train1\.jpg' does not exist"):
        dataset[0]


@pytest.mark.parametrize('height, width', [(1, 1), (7, 3000), (3000, 7), (33, 47)])
@pytest.mark.parametrize('config', ['ti_coco', 'ti_folder'])
@pytest.mark.parametrize('with_objects', [True, False], ids=['objects', 'empty'])
def test_extreme_images_pass_the_pipelines(tmp_path, load_config, config, height, width, with_objects):
    entries = [annotation(1, 1, bbox=[0, 0, width, height], segmentation=[[0, 0, width, 0, width, height, 0, height]])]
    write(tmp_path, 'one', [(height, width)], entries if with_objects else [], [dict(id=1, name='a')])
    files = dict(data_root=str(tmp_path), train_ann='one.json', val_ann='one.json', train_img='images')
    cfg = load_config(f'vim/cascade_mask_rcnn_vim_{config}.py', **files)
    for loader in (cfg.train_dataloader, cfg.test_dataloader):
        dataset = build(tmp_path, 'one', pipeline=[], test_mode=True)
        run = Compose([TRANSFORMS.build(step) for step in loader.dataset.pipeline])
        for _ in range(3):
            packed = run(dataset.get_data_info(0))
            assert min(packed['inputs'].shape[1:]) >= 1
            assert max(packed['inputs'].shape[1:]) <= (1706 if 'folder' in config else 1024)
            truth = packed['data_samples'].gt_instances
            assert len(truth.bboxes) == len(truth.labels) == len(truth.masks) <= with_objects


def test_shapes_build_from_their_own_class(tmp_path):
    settings = dict(num_train=3, num_val=2, image_size=(64, 64), size_range=(16, 40))
    dataset = DATASETS.build(
        dict(type='mmvim.ShapesDataset', split='val', data_root=str(tmp_path / 's'), shapes=settings, pipeline=PIPELINE)
    )
    assert dataset.metainfo['classes'] == ('circle', 'rectangle', 'triangle', 'star')
    assert len(dataset) == 2
    sample = dataset[0]
    for mask, box in zip(sample['gt_masks'].masks, sample['gt_bboxes'].tensor.tolist(), strict=True):
        rows, columns = np.nonzero(mask)
        assert box == [columns.min(), rows.min(), columns.max() + 1, rows.max() + 1]
