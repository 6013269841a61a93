"""VisionMamba reproduces the original model: logits, feature maps, gradients, names."""

import json

import numpy as np
import pytest
import torch
from mmengine.registry import MODELS
from torch import nn

import mmvim  # noqa: F401

SMALL = dict(arch=dict(embed_dims=64, depth=4), img_size=96)
ROPE_128 = dict(arch=dict(embed_dims=64, depth=4), img_size=128, cls_token=None, out_type='featmap')

# case: seed, batch, classes, pooling of logits over tokens, arguments
LOGITS = {
    'vim_tiny_224': (1, 2, 1000, None, dict(arch='tiny', img_size=224)),
    'vim_tiny_stride8_224': (2, 1, 1000, None, dict(arch='tiny', img_size=224, patch_stride=8)),
    'vim_small_224': (3, 1, 1000, None, dict(arch='small', img_size=224)),
    'vim_head_cls': (11, 2, 10, None, dict(SMALL, cls_token='head')),
    'vim_double_cls': (12, 2, 10, None, dict(SMALL, cls_token='double')),
    'vim_mean_pool': (13, 2, 10, None, dict(SMALL, cls_token=None, out_type='avg_featmap')),
    'vim_max_pool': (14, 2, 10, 'max', dict(SMALL, cls_token=None, out_type='raw')),
    'vim_last_token': (15, 2, 10, None, dict(SMALL, cls_token=None, out_type='last_token')),
    'vim_bidir_none': (16, 2, 10, None, dict(SMALL, directions='none')),
    'vim_bidir_block': (17, 2, 10, None, dict(SMALL, directions='block')),
    'vim_bidir_ssm_v1': (18, 2, 10, None, dict(SMALL, directions='v1')),
    'vim_no_divide': (19, 2, 10, None, dict(SMALL, divide_output=False)),
    'vim_rope': (
        20,
        2,
        10,
        None,
        dict(SMALL, cls_token=None, out_type='avg_featmap', rotary='both', rotary_pretrain_size=6),
    ),
}

# case: seed, arguments
MAPS = {
    'vim_tiny_seg_512': (
        31,
        dict(arch='tiny', img_size=512, cls_token=None, out_type='featmap', out_indices=(5, 11, 17, 23)),
    ),
    'vim_tiny_seg_512_residual_add': (
        32,
        dict(
            arch='tiny',
            img_size=512,
            cls_token=None,
            out_type='featmap',
            out_indices=(5, 11, 17, 23),
            feature_source='residual',
        ),
    ),
    'vim_seg_small_add_norm': (
        34,
        dict(
            arch=dict(embed_dims=64, depth=8),
            img_size=128,
            cls_token=None,
            out_type='featmap',
            feature_source='residual',
            final_norm=True,
        ),
    ),
    'vim_tiny_det_1024': (35, dict(arch='tiny', img_size=1024, cls_token=None, out_type='featmap')),
    'vim_rope_pt14': (36, dict(ROPE_128, rotary='both', feature_source='residual')),
    'vim_rope_hidden_only': (37, dict(ROPE_128, rotary='hidden')),
    'vim_layer_scale': (38, dict(ROPE_128, layer_scale_init=1e-5)),
}


def test_no_array_is_left_out(reference_arrays):
    assert set(LOGITS) == set(reference_arrays('vim'))
    assert {*MAPS, 'vim_seg_small_fpn'} == {name.partition('.')[0] for name in reference_arrays('vim_dense')}


class Classifier(nn.Module):
    """A backbone with the published classifier beside it, so that all names are the published ones."""

    def __init__(self, num_classes, **kwargs):
        super().__init__()
        self.backbone = MODELS.build(dict(type='mmvim.VisionMamba', **kwargs))
        self.head = nn.Linear(self.backbone.embed_dims, num_classes)

    def forward(self, x):
        return self.head(self.backbone(x)[-1])


def published(name):
    return name.removeprefix('backbone.')


@pytest.mark.parametrize('case', LOGITS)
def test_logits(case, fill_parameters, reference_input, reference_arrays, assert_agrees):
    seed, batch, num_classes, pooling, kwargs = LOGITS[case]
    model = fill_parameters(Classifier(num_classes, **kwargs), seed, published)
    with torch.inference_mode():
        logits = model(reference_input(seed, batch, 3, kwargs['img_size'], kwargs['img_size']))
    if pooling == 'max':
        logits = logits.max(dim=1).values
    assert_agrees(logits, reference_arrays('vim')[case])


@pytest.mark.parametrize('case', MAPS)
def test_feature_maps(case, fill_parameters, reference_input, reference_arrays, assert_agrees):
    seed, kwargs = MAPS[case]
    model = fill_parameters(MODELS.build(dict(type='mmvim.VisionMamba', **kwargs)), seed)
    with torch.inference_mode():
        maps = model(reference_input(seed, 1, 3, kwargs['img_size'], kwargs['img_size']))
    stored = {name: array for name, array in reference_arrays('vim_dense').items() if name.startswith(f'{case}.')}
    assert len(maps) == len(stored)
    for i, feature_map in enumerate(maps):
        assert_agrees(feature_map, stored[f'{case}.{i}'])


def test_four_maps_through_feature2pyramid(fill_parameters, reference_input, reference_arrays, assert_agrees):
    """The deconvolutions of the published segmentation files are MMSegmentation's Feature2Pyramid by other names."""
    from mmseg.models.necks import Feature2Pyramid

    backbone = MODELS.build(
        dict(
            type='mmvim.VisionMamba',
            arch=dict(embed_dims=64, depth=8),
            img_size=128,
            cls_token=None,
            out_type='featmap',
            out_indices=(1, 3, 5, 7),
        )
    )
    neck = Feature2Pyramid(64, norm_cfg=dict(type='BN', eps=1e-5))
    fill_parameters(backbone, 33)
    fill_parameters(neck, 33, lambda name: name.replace('upsample_4x', 'fpn1').replace('upsample_2x', 'fpn2'))
    with torch.inference_mode():
        maps = neck(backbone(reference_input(33, 1, 3, 128, 128)))
    for i, feature_map in enumerate(maps):
        assert_agrees(feature_map, reference_arrays('vim_dense')[f'vim_seg_small_fpn.{i}'])


@pytest.mark.parametrize('with_cp', [False, True], ids=['plain', 'checkpointed'])
def test_gradients(with_cp, fill_parameters, reference_input, reference_arrays):
    stored = {
        name.partition(':')[2]: array
        for name, array in reference_arrays('gradients').items()
        if name.startswith('vim_small_grad:')
    }
    model = fill_parameters(Classifier(10, with_cp=with_cp, **SMALL), 41, published)
    logits = model(reference_input(41, 2, 3, 96, 96))
    weight = np.random.default_rng(1041).standard_normal(tuple(logits.shape)).astype(np.float32)
    (logits * torch.from_numpy(weight)).sum().backward()
    gradients = {published(name): parameter.grad for name, parameter in model.named_parameters()}
    assert gradients.keys() == stored.keys()
    for name, (norm, total) in stored.items():
        assert abs(gradients[name].norm().item() - norm) <= 1e-4 * norm, name
        assert abs(gradients[name].sum().item() - total) <= 1e-4 * norm, name


def test_names_and_shapes_are_the_published_ones():
    with open(f'{__file__.rpartition("models")[0]}data/vim_tiny_keys.json') as file:
        layer_0 = json.load(file)
    expected = {}
    for name, shape in layer_0.items():
        for i in range(24 if name.startswith('layers.0.') else 1):
            expected[name.replace('layers.0.', f'layers.{i}.')] = tuple(shape)
    model = Classifier(1000, arch='tiny')
    actual = {published(name): tuple(entry.shape) for name, entry in model.state_dict().items()}
    assert actual == expected


@pytest.mark.parametrize(
    ('kwargs', 'parameters'),
    [(dict(arch='tiny'), 7_148_008), (dict(arch='tiny', patch_stride=8), 7_250_344), (dict(arch='small'), 25_796_584)],
)
def test_parameter_counts(kwargs, parameters):
    assert sum(p.numel() for p in Classifier(1000, **kwargs).parameters()) == parameters
