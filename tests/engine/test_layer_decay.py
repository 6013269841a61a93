"""Layer-wise learning rates and the declared no-decay set, in the three hosts."""

import pytest
import torch
from mmengine.model import BaseModule
from mmengine.optim import build_optim_wrapper
from mmengine.registry import MODELS, DefaultScope
from torch import nn

import mmvim  # noqa: F401

BACKBONE = dict(type='mmvim.VisionMamba', arch=dict(embed_dims=32, depth=2), img_size=32)


class Model(BaseModule):
    def __init__(self, **kwargs):
        super().__init__()
        self.backbone = MODELS.build(dict(BACKBONE, **kwargs))
        self.head = nn.Sequential(nn.LayerNorm(32), nn.Linear(32, 3))

    def get_layer_depth(self, *args, **kwargs):
        raise AssertionError('only the backbone knows the depths')


def settings_by_name(model, **paramwise_cfg):
    wrapper = build_optim_wrapper(
        model,
        dict(
            type='OptimWrapper',
            optimizer=dict(type='AdamW', lr=1.0, weight_decay=0.5),
            constructor='mmvim.LayerDecayOptimWrapperConstructor',
            **(dict(paramwise_cfg=paramwise_cfg) if paramwise_cfg else {}),
        ),
    )
    names = {id(p): name for name, p in model.named_parameters()}
    groups = wrapper.optimizer.param_groups
    found = {names[id(p)]: (group['lr'], group['weight_decay']) for group in groups for p in group['params']}
    assert sum(len(group['params']) for group in groups) == len(found)
    return found


@pytest.mark.parametrize('scope', ['mmdet', 'mmseg', 'mmpretrain'])
def test_rates_and_decay(scope):
    with DefaultScope.overwrite_default_scope(scope):
        found = settings_by_name(Model(), decay_rate=0.5)
    assert found['backbone.patch_embed.proj.weight'] == (0.125, 0.5)
    assert found['backbone.patch_embed.proj.bias'] == (0.125, 0.0)
    assert found['backbone.pos_embed'] == (0.125, 0.0)
    assert found['backbone.cls_token'] == (0.125, 0.0)
    assert found['backbone.layers.0.mixer.in_proj.weight'] == (0.25, 0.5)
    assert found['backbone.layers.0.norm.weight'] == (0.25, 0.0)
    assert found['backbone.layers.1.mixer.A_b_log'] == (0.5, 0.0)
    assert found['backbone.layers.1.mixer.D'] == (0.5, 0.0)
    assert found['backbone.layers.1.mixer.conv1d.weight'] == (0.5, 0.5)
    assert found['backbone.norm_f.weight'] == (1.0, 0.0)
    assert found['head.0.weight'] == (1.0, 0.0)
    assert found['head.1.weight'] == (1.0, 0.5)
    assert found.keys() == dict(Model().named_parameters()).keys()


def test_whole_model_of_a_host_hands_its_depths_on():
    from mmpretrain.models import ImageClassifier

    model = ImageClassifier(backbone=BACKBONE, head=dict(type='LinearClsHead', num_classes=3, in_channels=32))
    found = settings_by_name(model, decay_rate=0.5)
    assert found['backbone.pos_embed'] == (0.125, 0.0)
    assert found['head.fc.weight'] == (1.0, 0.5)


def test_defaults_without_paramwise_cfg():
    found = settings_by_name(Model())
    assert {lr for lr, _ in found.values()} == {1.0}
    assert found['backbone.layers.0.mixer.A_log'] == (1.0, 0.0)


def test_decay_of_the_embedding_alone():
    found = settings_by_name(Model(), decay_rate=0.5, decay_scope='embedding')
    assert found['backbone.pos_embed'] == (0.125, 0.0)
    assert found['backbone.layers.0.mixer.in_proj.weight'] == (1.0, 0.5)


def test_custom_keys_match_whole_names():
    keys = {'backbone.*.D': dict(decay_mult=1.0), 'head.*': dict(lr_mult=10.0)}
    found = settings_by_name(Model(), custom_keys=keys)
    assert found['backbone.layers.0.mixer.D'] == (1.0, 0.5)
    assert found['backbone.layers.0.mixer.D_b'] == (1.0, 0.0)
    assert found['head.1.weight'] == (10.0, 0.5)


def test_frozen_parameters_are_left_out():
    assert 'backbone.pos_embed' not in settings_by_name(Model(frozen_stages=0))


@pytest.mark.parametrize(
    ('cfg', 'message'),
    [
        (dict(layer_decay_rate=0.5), 'layer_decay_rate'),
        (dict(decay_rate=1.5), 'decay_rate must be in'),
        (dict(decay_scope='some'), 'decay_scope must be one of'),
    ],
)
def test_bad_settings(cfg, message):
    with pytest.raises(ValueError, match=message):
        settings_by_name(Model(), **cfg)


def test_layer_decay_needs_depths():
    with pytest.raises(ValueError, match='get_layer_depth'):
        settings_by_name(nn.Sequential(nn.Linear(2, 2)), decay_rate=0.5)


def test_one_optimiser_step():
    model = Model()
    model.backbone.init_weights()
    wrapper = build_optim_wrapper(
        model,
        dict(
            type='OptimWrapper',
            optimizer=dict(type='AdamW', lr=1e-3, weight_decay=0.1),
            constructor='mmvim.LayerDecayOptimWrapperConstructor',
            paramwise_cfg=dict(decay_rate=0.9),
        ),
    )
    before = {name: p.detach().clone() for name, p in model.named_parameters()}
    loss = model.head(model.backbone(torch.randn(2, 3, 32, 32))[0]).square().mean()
    wrapper.update_params(loss)
    assert all(not torch.equal(before[name], p) for name, p in model.named_parameters() if 'head.0.bias' not in name)
