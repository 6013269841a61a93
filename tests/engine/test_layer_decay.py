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


CASES = [
    ('declared', set()),
    ('embeddings', {'A_log', 'A_b_log'}),
    ('positions', {'A_log', 'A_b_log', 'cls_token'}),
    ('none', {'A_log', 'A_b_log', 'cls_token', 'pos_embed'}),
]


@pytest.mark.parametrize(('no_decay', 'decayed'), CASES)
def test_which_of_the_declared_names_have_no_weight_decay(no_decay, decayed):
    """By dimension, where the name does not say otherwise: D has one."""
    model = Model()
    found = settings_by_name(model, decay_rate=0.5, no_decay=no_decay)
    plain = settings_by_name(model, decay_rate=0.5)
    names = {f'backbone.{name}' for name in model.backbone.no_weight_decay()}
    for name, (lr, weight_decay) in plain.items():
        wanted = (0.5 if name.rpartition('.')[2] in decayed else 0.0) if name in names else weight_decay
        assert found[name] == (lr, wanted), name


def test_weight_decay_of_all_but_positions():
    found = settings_by_name(Model(), no_decay='positions', norm_decay_mult=1, bias_decay_mult=1, flat_decay_mult=1)
    assert [name for name, (_, weight_decay) in found.items() if weight_decay != 0.5] == ['backbone.pos_embed']


def test_decay_of_the_embedding_alone():
    found = settings_by_name(Model(), decay_rate=0.5, decay_scope='embedding')
    assert found['backbone.pos_embed'] == (0.125, 0.0)
    assert found['backbone.layers.0.mixer.in_proj.weight'] == (1.0, 0.5)


def test_custom_keys_with_wildcards_match_whole_names():
    keys = {'backbone.*.D': dict(decay_mult=1.0), 'head.*': dict(lr_mult=10.0)}
    found = settings_by_name(Model(), custom_keys=keys)
    assert found['backbone.layers.0.mixer.D'] == (1.0, 0.5)
    assert found['backbone.layers.0.mixer.D_b'] == (1.0, 0.0)
    assert found['head.1.weight'] == (10.0, 0.5)


def test_custom_keys_match_parts_of_names_as_in_the_hosts():
    """As DefaultOptimWrapperConstructor of mmengine: every name that contains the key, the longest key first."""
    keys = {'backbone': dict(lr_mult=0.1), 'backbone.layers.1': dict(lr_mult=0.5), 'head.1': dict(decay_mult=0.2)}
    found = settings_by_name(Model(), custom_keys=keys)
    hosts = build_optim_wrapper(
        model := Model(),
        dict(optimizer=dict(type='AdamW', lr=1.0, weight_decay=0.5), paramwise_cfg=dict(custom_keys=keys)),
    )
    names = {id(parameter): name for name, parameter in model.named_parameters()}
    expected = {names[id(group['params'][0])]: group['lr'] for group in hosts.optimizer.param_groups}
    assert {name: lr for name, (lr, _) in found.items()} == expected
    assert {lr for lr in expected.values()} == {0.1, 0.5, 1.0}
    assert found['head.1.weight'] == (1.0, 0.1)


def test_a_factor_on_the_learning_rate_leaves_the_weight_decay_as_it_is():
    plain = settings_by_name(Model(), decay_rate=0.5)
    found = settings_by_name(Model(), decay_rate=0.5, custom_keys={'backbone': dict(lr_mult=0.1)})
    for name, (lr, weight_decay) in plain.items():
        assert found[name] == (pytest.approx(lr * 0.1 if name.startswith('backbone.') else lr), weight_decay), name


def test_a_custom_key_may_be_of_frozen_parameters_alone():
    found = settings_by_name(Model(frozen_stages=0), custom_keys={'pos_embed': dict(decay_mult=0.0)})
    assert 'backbone.pos_embed' not in found


def test_frozen_parameters_are_left_out():
    assert 'backbone.pos_embed' not in settings_by_name(Model(frozen_stages=0))


@pytest.mark.parametrize(
    ('cfg', 'message'),
    [
        (dict(layer_decay_rate=0.5), 'layer_decay_rate'),
        (dict(decay_rate=1.5), 'decay_rate must be in'),
        (dict(decay_scope='some'), 'decay_scope must be one of'),
        (dict(no_decay='some'), "no_decay must be one of .*'positions'.*, got 'some'"),
        (dict(custom_keys={'backbon3': {}}), "'backbon3' fits no parameter of Model; did you mean 'backbone'?"),
        (
            dict(custom_keys={'neck': {}}),
            r"'neck' fits no parameter of Model; its names are like 'backbone\.\w+' and",
        ),
        (dict(custom_keys={'layers.*.D': {}}), r"'layers\.\*\.D' fits no parameter"),
        (
            dict(custom_keys={'backbone': dict(lr=0.1)}),
            r"custom_keys\['backbone'\] may be a dict with \['decay_mult', ",
        ),
        (dict(custom_keys={'backbone': 0.1}), r"custom_keys\['backbone'\] may be a dict .*, got 0.1"),
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
