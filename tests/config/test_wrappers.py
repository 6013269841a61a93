"""Top-level keys reach data sets and transforms inside wrappers, and a label has one meaning in joined data sets."""

import json

import cv2
import numpy as np
import pytest
from mmdet.registry import DATASETS
from mmengine.config import Config
from mmengine.logging import MMLogger
from mmengine.registry import init_default_scope

from mmvim.config.completion import complete_config
from mmvim.engine.runner import Runner
from mmvim.errors import ConfigError, DataError
from mmvim.registry import METRICS

FOLDER = 'vim/cascade_mask_rcnn_vim_ti_folder.py'
LOAD = [dict(type='mmvim.LoadImageFromFile'), dict(type='LoadAnnotations', with_bbox=True, with_mask=True)]
SIZED = [
    dict(type='RandomResize', ratio_range=(0.5, 1.5), resize_type='mmvim.Resize', keep_ratio=True),
    dict(type='RandomCrop', allow_negative_crop=True),
]
PACK = [dict(type='PackDetInputs')]


@pytest.fixture
def folder(tmp_path):
    """Images of several sizes, and two annotation files: one with more classes than the other, in another order."""
    init_default_scope('mmdet')
    (tmp_path / 'images').mkdir()
    heights = (40, 49, 58, 67)
    for i, height in enumerate(heights):
        cv2.imwrite(str(tmp_path / 'images' / f'{i}.png'), np.full((height, 60, 3), 40 * i, np.uint8))
    images = [dict(id=i, file_name=f'{i}.png', height=height, width=60) for i, height in enumerate(heights)]
    for name, names in (('one', ['fig', 'date']), ('two', ['date', 'fig', 'nut'])):
        corners = [(i, j, 5 + 9 * j) for i in range(4) for j in range(len(names))]
        annotations = [
            dict(image_id=i, category_id=j, bbox=[x, 5, 8, 8], segmentation=[[x, 5, x + 8, 5, x + 8, 13, x, 13]])
            for i, j, x in corners
        ]
        categories = [dict(id=j, name=label) for j, label in enumerate(names)]
        content = dict(images=images, annotations=annotations, categories=categories)
        (tmp_path / f'{name}.json').write_text(json.dumps(content))
    return tmp_path


def source(ann=None, pipeline=(), **settings):
    named = dict(ann_file=f'{ann}.json') if ann else {}
    return dict(type='mmvim.CocoFolderDataset', pipeline=[*LOAD, *pipeline], **named, **settings)


def boxes():
    return dict(source(), pipeline=[LOAD[0], dict(type='LoadAnnotations', with_bbox=True)])  # Mosaic knows no masks


def mixed(dataset, *steps):
    return dict(type='MultiImageMixDataset', dataset=dataset, pipeline=[*SIZED, *steps, *PACK])


WRAPPED = {
    'alone': source(pipeline=[*SIZED, *PACK]),
    'repeated': dict(type='RepeatDataset', times=2, dataset=source(pipeline=[*SIZED, *PACK])),
    'balanced': dict(type='ClassBalancedDataset', oversample_thr=0.5, dataset=source(pipeline=[*SIZED, *PACK])),
    'mixed': mixed(source(), dict(type='CopyPaste')),
    'with scope': dict(mixed(source(), dict(type='mmdet.CopyPaste')), type='mmdet.MultiImageMixDataset'),
    'mosaic': mixed(boxes(), dict(type='Mosaic', img_scale=(64, 64)), dict(type='MixUp', img_scale=(64, 64))),
    **{
        f'joined by {kind}': dict(type=kind, datasets=[source('one', [*SIZED, *PACK]), source('two', [*SIZED, *PACK])])
        for kind in ('ConcatDataset', 'mmdet.ConcatDataset', 'mmengine.ConcatDataset')
    },
    'nested': dict(
        type='RepeatDataset',
        times=2,
        dataset=dict(
            type='ConcatDataset',
            datasets=[
                dict(type='RepeatDataset', times=3, dataset=source('one', [*SIZED, *PACK])),
                dict(type='ClassBalancedDataset', oversample_thr=0.5, dataset=source('two', [*SIZED, *PACK])),
            ],
        ),
    ),
    'joined, then mixed': mixed(
        dict(type='ConcatDataset', datasets=[source('one'), source('two')]), dict(type='CopyPaste')
    ),
}


def complete(load_config, folder, dataset, **keys):
    cfg = Config(dict(load_config('vim/cascade_mask_rcnn_vim_ti_coco.py').to_dict()))
    keys = {**dict(train_ann='one.json', train_img='images', image_size=48), **keys}
    cfg.merge_from_dict(dict(data_root=str(folder), **keys))
    cfg.train_dataloader = dict(
        batch_size=1, num_workers=0, sampler=dict(type='DefaultSampler', shuffle=False), dataset=dataset
    )
    cfg.val_dataloader = cfg.test_dataloader = cfg.val_evaluator = cfg.test_evaluator = None
    cfg.train_pipeline = cfg.test_pipeline = None
    complete_config(cfg)
    return cfg


@pytest.mark.parametrize('kind', WRAPPED)
def test_keys_reach_what_is_wrapped(load_config, folder, kind):
    cfg = complete(load_config, folder, WRAPPED[kind])
    one_file = 'joined' not in kind and kind != 'nested'
    classes = ('fig', 'date') if one_file else ('fig', 'date', 'nut')
    assert cfg.model.roi_head.num_classes == len(classes)
    dataset = Runner.build_dataloader(cfg.train_dataloader).dataset
    assert dataset.metainfo['classes'] == classes
    found = set()
    for i in range(len(dataset)):
        sample = dataset[i]
        found.update(sample['data_samples'].gt_instances.labels.tolist())
        assert max(sample['inputs'].shape[1:]) <= 80 + 48  # 48 * 1333 / 800, with mosaic and mixup up to 128
    assert found == set(range(len(classes)))


@pytest.mark.parametrize('step', ['Mosaic', 'MixUp'])
def test_masks_are_not_left_behind(load_config, folder, step):
    cfg = complete(load_config, folder, mixed(source(), dict(type=step, img_scale=(64, 64))))
    with pytest.raises(ConfigError, match=f'{step} of MMDetection moves boxes and not masks: set with_mask=False'):
        Runner.build_dataloader(cfg.train_dataloader).dataset[0]


@pytest.mark.parametrize('kind', ['ConcatDataset', 'mmengine.ConcatDataset'])
def test_a_label_means_one_class_in_all_sources(load_config, folder, kind):
    joined = dict(type=kind, datasets=[source('one', PACK), source('two', PACK)])
    dataset = Runner.build_dataloader(complete(load_config, folder, joined).train_dataloader).dataset
    labels = [[i['bbox_label'] for i in dataset.get_data_info(n)['instances']] for n in (0, 4)]
    assert labels == [[0, 1], [1, 0, 2]]
    stated = [
        source('one', metainfo=dict(classes=('fig', 'date'))),
        source('two', metainfo=dict(classes=('date', 'fig'))),
    ]
    loader = dict(batch_size=1, num_workers=0, sampler=dict(type='DefaultSampler', shuffle=False))
    for part in stated:
        part.update(data_root=str(folder), data_prefix=dict(img='images'))
    with pytest.raises((DataError, ValueError), match='different classes|does not match meta information'):
        Runner.build_dataloader(dict(loader, dataset=dict(type=kind, datasets=stated)))


def test_some_of_the_classes_of_a_file(load_config, folder, caplog):
    MMLogger.get_current_instance().addHandler(caplog.handler)
    cfg = complete(load_config, folder, source('two', PACK), train_ann='two.json', classes=['nut', 'fig'])
    assert cfg.model.roi_head.num_classes == 2
    dataset = Runner.build_dataloader(cfg.train_dataloader).dataset
    assert dataset.metainfo['classes'] == ('nut', 'fig')
    assert [i['bbox_label'] for i in dataset.get_data_info(0)['instances']] == [1, 0]
    assert "the classes ['date'] are left out" in caplog.text
    assert '8 of 12 annotations are trained on, left out: 4 of other classes' in caplog.text
    assert not any(record.levelname == 'WARNING' and 'left out' in record.message for record in caplog.records)
    assert "two.json': \n" not in caplog.text
    MMLogger.get_current_instance().removeHandler(caplog.handler)


@pytest.mark.parametrize('classes', [['nut', 'figs'], ['Fig'], [7], 'figs'])
def test_only_unknown_names_are_refused(load_config, folder, classes):
    with pytest.raises(ConfigError, match=r"classes has \['.*'\], which the annotation files to train on do not have"):
        complete(load_config, folder, source('two', PACK), classes=classes)


def test_given_names_stand_where_there_is_no_file_to_train_on(load_config, folder):
    cfg = load_config(FOLDER, data_root=str(folder), train_ann='gone.json', val_ann='one.json', classes=['fig', 'x'])
    assert cfg.val_dataloader.dataset.metainfo == dict(classes=('fig', 'x'))


def test_numbers_name_classes_too(load_config, folder):
    path = folder / 'one.json'
    path.write_text(path.read_text().replace('"fig"', '1').replace('"date"', '2'))
    for classes, labels in ((None, [0, 1]), ([2, 1], [1, 0]), ([2], [0])):
        cfg = complete(load_config, folder, source('one', PACK), classes=classes)
        dataset = Runner.build_dataloader(cfg.train_dataloader).dataset
        assert [i['bbox_label'] for i in dataset.get_data_info(0)['instances']] == labels


def test_a_missing_folder_in_a_join_is_named(folder):
    parts = [source('one', data_root=str(root), data_prefix=dict(img='images')) for root in (folder, folder / 'gone')]
    with pytest.raises(DataError, match=r"data folder '.*gone' .*does not exist"):
        Runner.build_dataloader(dict(dataset=dict(type='ConcatDataset', datasets=parts)))


def built(folder, **settings):
    return DATASETS.build(source('test', PACK, data_root=str(folder), data_prefix=dict(img='images'), **settings))


def test_a_file_without_annotations_predicts_and_says_what_evaluating_lacks(folder):
    content = json.loads((folder / 'one.json').read_text())
    del content['annotations']
    (folder / 'test.json').write_text(json.dumps(content))
    with pytest.raises(DataError, match=r"no list \['annotations'\].*set format_only=True and outfile_prefix"):
        built(folder)
    dataset = built(folder, test_mode=True)
    assert len(dataset) == 4
    metric = METRICS.build(dict(type='mmvim.CocoFolderMetric', metric='bbox'))
    with pytest.raises(DataError, match=r"no list \['annotations'\].*set format_only=True and outfile_prefix"):
        metric.dataset_meta = dataset.metainfo
    with pytest.raises(ConfigError, match='set outfile_prefix'):
        METRICS.build(dict(type='mmvim.CocoFolderMetric', format_only=True))
    metric = METRICS.build(
        dict(type='mmvim.CocoFolderMetric', metric='bbox', format_only=True, outfile_prefix=str(folder / 'found'))
    )
    metric.dataset_meta = dataset.metainfo
    found = dict(bboxes=np.array([[1.0, 2, 3, 4]]), scores=np.array([0.5]), labels=np.array([1]))
    metric.results = [(dict(img_id=i), dict(found, img_id=i)) for i in range(4)]
    metric.compute_metrics(metric.results)
    written = json.loads((folder / 'found.bbox.json').read_text())
    assert [(entry['image_id'], entry['category_id']) for entry in written] == [(i, 1) for i in range(4)]


def test_the_metric_names_what_it_cannot_compare(folder):
    content = json.loads((folder / 'one.json').read_text())
    del content['annotations'][1]['segmentation']
    (folder / 'test.json').write_text(json.dumps(content))
    metric = METRICS.build(dict(type='mmvim.CocoFolderMetric', metric=['bbox', 'segm']))
    with pytest.raises(DataError, match=r"1 annotations have no 'segmentation' \(first: 2\).*set metric='bbox'"):
        metric.dataset_meta = dict(classes=('fig', 'date'), ann_file=str(folder / 'test.json'))
    with pytest.raises(ConfigError, match='needs mmvim.CocoFolderDataset with test_mode=True'):
        metric.dataset_meta = dict(classes=('fig', 'date'))
    with pytest.raises(DataError, match='merge the files'):
        metric.dataset_meta = [dict(ann_file='a'), dict(ann_file='b')]
