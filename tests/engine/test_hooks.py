import logging
from types import SimpleNamespace

import pytest
import torch
from mmengine.config import Config
from mmengine.registry import HOOKS, MODELS, init_default_scope
from mmengine.utils import get_installed_path
from torch import nn

from mmvim.engine.hooks import head_class_counts
from mmvim.errors import CheckpointError, ConfigError


class Head(nn.Linear):
    def __init__(self, classes):
        super().__init__(8, classes)
        self.num_classes = classes


class Model(nn.Module):
    def __init__(self, classes=3):
        super().__init__()
        self.backbone = nn.Sequential(nn.Linear(4, 8), nn.Linear(8, 8), nn.Linear(8, 8))
        self.rpn_head = Head(1)
        self.bbox_head = nn.ModuleList([Head(classes), Head(classes)])


def runner(model, classes=('a', 'b', 'c'), testing=False, resume=False):
    loader = SimpleNamespace(dataset=SimpleNamespace(metainfo=dict(classes=classes)))
    return SimpleNamespace(
        model=model,
        train_dataloader=loader,
        val_dataloader=loader,
        test_dataloader=loader,
        testing=testing,
        _resume=resume,
        _load_from='file.pth',
        work_dir='work',
        logger=logging.getLogger('test'),
    )


def checkpoint(model, classes=('a', 'b', 'c')):
    return dict(state_dict=dict(model.state_dict()), meta=dict(dataset_meta=dict(classes=classes)))


def test_every_head_is_looked_at_but_the_proposals():
    assert list(head_class_counts(Model())) == [('bbox_head.0', 3), ('bbox_head.1', 3)]


def build_from(config, scope):
    """The model of a host's own config, without memory for its weights."""
    cfg = Config.fromfile(get_installed_path(scope) + '/.mim/configs/' + config)
    init_default_scope(scope)
    with torch.device('meta'):
        return MODELS.build(cfg.model)


@pytest.mark.parametrize(
    ('config', 'num_classes', 'checked'),
    [
        ('htc/htc_r50_fpn_1x_coco.py', 80, 6),
        ('scnet/scnet_r50_fpn_1x_coco.py', 80, 5),
        ('panoptic_fpn/panoptic-fpn_r50_fpn_1x_coco.py', 133, 1),
        ('mask2former/mask2former_r50_8xb2-lsj-50e_coco-panoptic.py', 133, 1),
        ('mask2former/mask2former_r50_8xb2-lsj-50e_coco.py', 80, 1),
        ('solov2/solov2_r50_fpn_1x_coco.py', 80, 1),
    ],
)
def test_heads_of_mmdet_with_classes_of_their_own_are_left_alone(config, num_classes, checked):
    pytest.importorskip('mmdet')
    model = build_from(config, 'mmdet')
    assert [count for _, count in head_class_counts(model)] == [num_classes] * checked
    hook = HOOKS.build(dict(type='mmvim.ClassCountHook'))
    hook.before_train(runner(model, classes=tuple(map(str, range(num_classes)))))
    with pytest.raises(ConfigError, match=f'has {num_classes} classes, but the data set of train_dataloader has 7 '):
        hook.before_train(runner(model, classes=tuple('abcdefg')))


def test_a_head_of_mmseg_for_borders_is_left_alone():
    pytest.importorskip('mmseg')
    model = build_from('stdc/stdc1_4xb12-80k_cityscapes-512x1024.py', 'mmseg')
    assert [count for _, count in head_class_counts(model)] == [19, 19, 19]


@pytest.mark.parametrize('moment', ['before_train', 'before_val', 'before_test'])
def test_class_counts_must_fit(moment):
    hook = HOOKS.build(dict(type='mmvim.ClassCountHook'))
    getattr(hook, moment)(runner(Model(3)))
    with pytest.raises(
        ConfigError, match=r'model.bbox_head.0 has 4 classes, but the data set of \w+ has 3 \(a, b, c\)'
    ):
        getattr(hook, moment)(runner(Model(4)))


def load(run, saved):
    HOOKS.build(dict(type='mmvim.CheckpointFitHook')).after_load_checkpoint(run, saved)


@pytest.mark.parametrize('state', [dict(testing=True), dict(resume=True), {}])
def test_its_own_checkpoint_fits(state):
    load(runner(Model(), **state), checkpoint(Model()))


@pytest.mark.parametrize('state', [dict(testing=True), dict(resume=True)])
def test_every_parameter_must_fit_in_tests_and_resumed_runs(state):
    with pytest.raises(CheckpointError, match=r"'file.pth' does not fit.*bbox_head.0.weight \(4, 8\) in the file"):
        load(runner(Model(), **state), checkpoint(Model(4)))


def test_a_start_from_other_heads_is_a_warning(caplog):
    load(runner(Model()), checkpoint(Model(4)))
    assert 'bbox_head.0.weight' in caplog.text


def test_a_start_from_another_model_is_refused():
    with pytest.raises(CheckpointError, match='does not fit the model of this config'):
        load(runner(Model()), dict(state_dict=dict(weight=torch.zeros(3))))


def test_a_start_from_the_weights_of_a_backbone_names_its_place_in_the_config():
    weights = {'layers.0.mixer.A_log': torch.zeros(3)}
    with pytest.raises(CheckpointError, match=r"name it by model.backbone.init_cfg=dict\(.*checkpoint='file.pth'\)"):
        load(runner(Model()), dict(state_dict=weights))
    with pytest.raises(CheckpointError, match='same number of classes$'):
        load(runner(Model(), testing=True), dict(state_dict=weights))


def test_classes_in_another_order_are_refused_in_tests_only():
    saved = checkpoint(Model(), ('a', 'c', 'b'))
    load(runner(Model()), saved)
    with pytest.raises(
        CheckpointError, match=r"trained on the classes \['a', 'c', 'b'\], the data set has \['a', 'b', 'c'\]"
    ):
        load(runner(Model(), testing=True), saved)
