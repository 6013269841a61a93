"""Segmentation with a folder of images and label maps of one's own: what a wrong value in a label map ends in."""

from pathlib import Path

import cv2
import numpy as np
import pytest
import torch
from mmengine.config import Config
from mmengine.registry import init_default_scope
from mmseg.evaluation import IoUMetric
from mmseg.models import FCNHead

from mmvim.engine.label_maps import check_outputs
from mmvim.engine.runner import Runner
from mmvim.errors import ConfigError
from mmvim.tools import command_line
from mmvim.tools import test as test_tool
from mmvim.tools import train as train_tool
from mmvim.tools.test import write_label_maps

CONFIGS = Path(__file__).parents[2] / 'configs'
CONFIG = """
_base_ = '{configs}/vim/upernet_vim-ti_camvid-240x180.py'

width, num_classes, ignore_index = 16, 3, 255
heads = dict(channels=width, num_classes=num_classes, ignore_index=ignore_index)
model = dict(
    data_preprocessor=dict(size=(64, 64), seg_pad_val=ignore_index),
    backbone=dict(arch=dict(_delete_=True, embed_dims=width, depth=4), img_size=64, out_indices=(0, 1, 2, 3)),
    neck=dict(embed_dim=width),
    decode_head=dict(in_channels=[width] * 4, **heads),
    auxiliary_head=dict(in_channels=width, **heads),
    test_cfg=dict(mode='slide', crop_size=(96, 96), stride=(64, 64)),
)
load, labels, pack = dict(type='LoadImageFromFile'), dict(type='LoadAnnotations'), dict(type='PackSegInputs')
dataset = dict(
    data_root='data', metainfo=dict(classes=('a', 'b', 'c')), ignore_index=ignore_index, pipeline=[load, labels, pack]
)
loader = dict(batch_size=2, num_workers=0, persistent_workers=False, dataset=dataset)
train_dataloader = dict(sampler=dict(type='DefaultSampler', shuffle=False), **loader)
val_dataloader = test_dataloader = dict(loader, batch_size=1)
val_evaluator = test_evaluator = dict(ignore_index=ignore_index)
train_cfg = dict(max_iters=1, val_interval=1)
param_scheduler = []
"""
SIZES = ((61, 47), (33, 52))  # smaller than the crop of the sliding test, and no multiples of the patch


@pytest.fixture
def folder(tmp_path, monkeypatch):
    """A folder with config and data, in which the tools run: images and label maps of the values 0 to 2."""
    random = np.random.default_rng(0)
    for split in ('train', 'val'):
        for i, size in enumerate(SIZES):
            for kind, picture in (
                ('images', random.integers(0, 256, (*size, 3))),
                ('annotations', random.integers(0, 3, size)),
            ):
                path = tmp_path / 'data' / kind / split / f'{i}.png'
                path.parent.mkdir(parents=True, exist_ok=True)
                cv2.imwrite(str(path), picture.astype(np.uint8))
    (tmp_path / 'c.py').write_text(CONFIG.format(configs=CONFIGS))
    monkeypatch.chdir(tmp_path)
    return tmp_path


def mark(folder, split, value):
    """Give one pixel of the split's second label map a value."""
    path = folder / 'data' / 'annotations' / split / '1.png'
    labels = cv2.imread(str(path), cv2.IMREAD_UNCHANGED)
    labels[5, 7] = value
    cv2.imwrite(str(path), labels)


def train(*options):
    given = ('--device', 'cpu', '--cfg-options', 'default_hooks.logger.interval=1', *options)
    command_line.run(train_tool, ['c.py', '--work-dir', 'work', *given])


@pytest.fixture
def error(capsys):
    """Run a tool that fails; returns its one line of error."""

    def run(tool, *arguments):
        with pytest.raises(SystemExit) as ended:
            tool(*arguments)
        assert ended.value.code == 1
        line = capsys.readouterr().err.strip().splitlines()[-1]
        assert line.startswith('error: ') and 'Traceback' not in line
        return line

    return run


IGNORE = [
    f'{place}.ignore_index=7'
    for place in ('model.decode_head', 'model.auxiliary_head', 'val_evaluator', 'val_dataloader.dataset')
]


def test_a_value_above_the_classes_is_named_before_the_loss_sees_it(folder, error):
    mark(folder, 'train', 7)
    line = error(train)
    assert "label map 'data/annotations/train/1.png' has the value 7, but model.decode_head has num_classes=3" in line
    assert 'ignore_index=255' in line and 'reduce_zero_label=True' in line
    line = error(train, 'model.decode_head.ignore_index=7')
    assert 'but model.auxiliary_head has num_classes=3 and ignore_index=255' in line


def test_the_value_to_ignore_trains_and_counts_nowhere(folder, capfd):
    for split in ('train', 'val'):
        mark(folder, split, 7)
    train('model.data_preprocessor.seg_pad_val=7', *IGNORE)
    output = capfd.readouterr().out
    assert 'Iter(train) [1/1]' in output and 'mIoU: ' in output


def test_values_are_those_of_the_file_though_zero_was_taken_away(folder, error):
    mark(folder, 'train', 9)
    line = error(train, 'train_dataloader.dataset.reduce_zero_label=True')
    assert 'has the value 9 (8 after reduce_zero_label)' in line


def test_padding_is_a_value_that_the_heads_know(folder, error):
    line = error(train, *IGNORE)
    assert 'model.data_preprocessor.seg_pad_val=255, but model.decode_head has num_classes=3 and ignore_index=7' in line


def test_validation_and_tests_refuse_a_value_that_the_metric_would_pass_over(folder, error):
    train()
    (checkpoint,) = (folder / 'work').glob('*.pth')
    checkpoint.rename('saved.pth')
    mark(folder, 'val', 7)
    expected = "'data/annotations/val/1.png' has the value 7, but {} (IoUMetric) has num_classes=3 and ignore_index=255"
    assert expected.format('val_evaluator') in error(train)

    def test(*arguments):
        command_line.run(test_tool, ['c.py', 'saved.pth', '--work-dir', 'work', *arguments])

    assert expected.format('test_evaluator') in error(test)
    assert expected.format('test_evaluator') in error(test, '--tta')
    test('--cfg-options', 'test_evaluator.format_only=True', 'test_evaluator.output_dir=maps')
    assert sorted(path.name for path in (folder / 'maps').iterdir()) == ['0.png', '1.png']


@pytest.mark.parametrize(
    'evaluator',
    [
        dict(type='IoUMetric'),
        [dict(type='DepthMetric'), dict(type='mmseg.IoUMetric')],
        dict(type='Evaluator', metrics=[dict(type='IoUMetric')]),
        dict(metrics=dict(type='IoUMetric')),
        dict(type=IoUMetric),
    ],
)
def test_predictions_are_written_in_every_form_of_an_evaluator(tmp_path, evaluator):
    init_default_scope('mmseg')
    cfg = Config(dict(test_evaluator=evaluator))
    write_label_maps(cfg, str(tmp_path / 'out'))
    *_, metric = Runner.build_evaluator(None, cfg.test_evaluator).metrics
    assert metric.output_dir == str(tmp_path / 'out') and (tmp_path / 'out').is_dir()


def test_predictions_need_a_metric_that_writes_them(tmp_path):
    with pytest.raises(ConfigError, match="has no metric that writes label maps: add one of .*'IoUMetric'"):
        write_label_maps(Config(dict(test_evaluator=[dict(type='DepthMetric')])), 'out')


def test_a_batch_of_two_sizes_is_padded_in_training_and_refused_in_validation(folder, error):
    line = error(train, 'val_dataloader.batch_size=2')
    assert 'batch_size=1' in line and list((folder / 'work').glob('*.pth'))


def paint(folder, split, change):
    """Change all label maps of a split."""
    for path in (folder / 'data' / 'annotations' / split).iterdir():
        cv2.imwrite(str(path), change(cv2.imread(str(path), cv2.IMREAD_UNCHANGED)))


def test_a_class_without_a_pixel_is_named_before_training_and_beside_the_metrics(folder, capfd):
    for split in ('train', 'val'):
        paint(folder, split, lambda labels: np.where(labels == 2, 255, labels).astype(np.uint8))
    train()
    lines = capfd.readouterr().out.splitlines()
    before, first, after = (
        next(i for i, line in enumerate(lines) if text in line)
        for text in (
            'train_dataloader: 1 of 3 classes cannot be learnt',
            'Iter(train) [1/1]',
            'metrics are over 2 of 3',
        )
    )
    assert before < first < after and 'no pixel of them: c; values in the files:' in lines[before]
    assert any('val_dataloader: 1 of 3 classes will be missing from the metrics' in line for line in lines[:first])


def test_validation_files_are_looked_through_before_training(folder, error):
    (folder / 'data/annotations/val/1.png').unlink()
    line = error(train, 'train_dataloader.num_workers=1')
    assert "label map 'data/annotations/val/1.png' does not exist" in line
    assert not list((folder / 'work').glob('*.pth'))


SOFTMAX, SIGMOID = (dict(type='CrossEntropyLoss', use_sigmoid=on, avg_non_ignore=True) for on in (False, True))


@pytest.mark.parametrize(
    'outputs, losses, learns',
    [
        (dict(num_classes=2), SOFTMAX, True),
        (dict(num_classes=2, out_channels=1), SIGMOID, True),
        (dict(num_classes=2, out_channels=1), dict(type='DiceLoss'), True),
        (dict(num_classes=2, out_channels=1), SOFTMAX, False),
        (dict(num_classes=1), SOFTMAX, False),
        (dict(num_classes=1), [dict(type='DiceLoss'), dict(SOFTMAX, loss_name='loss_b')], False),
    ],
)
def test_a_softmax_over_one_output_learns_nothing(outputs, losses, learns):
    model = torch.nn.Module()
    model.decode_head = FCNHead(in_channels=4, channels=4, num_convs=1, loss_decode=losses, **outputs)
    if learns:
        return check_outputs(model)
    with pytest.raises(ConfigError, match=r'nothing can be learnt: model.decode_head has one output .* as a class too'):
        check_outputs(model)
