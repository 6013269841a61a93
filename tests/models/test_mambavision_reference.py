"""MambaVision reproduces the original model: logits, stage maps, gradients, names, parameters, operations."""

import json
from pathlib import Path

import numpy as np
import pytest
import torch
from mmengine.registry import MODELS
from torch import nn

import mmvim  # noqa: F401
from mmvim.models import MambaVision

DATA = Path(__file__).parents[1] / 'data'

# case: seed, height and width, arch
LOGITS = {
    'mambavision_t_224': (51, (224, 224), 'tiny'),
    'mambavision_b_224': (52, (224, 224), 'base'),
    'mambavision_t_512x224': (53, (512, 224), 'tiny'),
}
# published, in millions
PARAMETERS = dict(tiny=31.8, tiny2=35.1, small=50.1, base=97.7, large=227.9, large2=241.5, large3=739.6)
SMALL = dict(
    arch=dict(embed_dims=16, stem_channels=8, depths=(1, 1, 3, 2), num_heads=(1, 2, 2, 4)), window_sizes=(8, 8, 6, 3)
)


class Classifier(nn.Module):
    """A backbone with the published classifier beside it, so that all names are the published ones."""

    def __init__(self, num_classes, **kwargs):
        super().__init__()
        self.backbone = MODELS.build(dict(type='mmvim.MambaVision', out_type='avg_featmap', **kwargs))
        self.head = nn.Linear(self.backbone.out_channels[-1], num_classes)

    def forward(self, x):
        return self.head(self.backbone(x)[-1])


def published(name):
    return name.removeprefix('backbone.')


@pytest.mark.parametrize('case', LOGITS)
def test_logits(case, fill_parameters, reference_input, reference_arrays, assert_agrees):
    seed, size, arch = LOGITS[case]
    model = fill_parameters(Classifier(1000, arch=arch), seed, published)
    with torch.inference_mode():
        assert_agrees(model(reference_input(seed, 1, 3, *size)), reference_arrays('mambavision')[case])


def test_stage_maps_with_windows_larger_than_the_maps(
    fill_parameters, reference_input, reference_arrays, assert_agrees
):
    model = MODELS.build(dict(type='mmvim.MambaVision', arch='tiny', out_type='raw', window_sizes=(8, 8, 64, 32)))
    fill_parameters(model, 54)
    with torch.inference_mode():
        maps = model(reference_input(54, 1, 3, 512, 512))
    assert len(maps) == 4
    for i, stage_map in enumerate(maps):
        assert tuple(stage_map.shape) == (1, 80 * 2**i, 128 // 2**i, 128 // 2**i)
        assert_agrees(stage_map[:, ::16, ::5, ::5], reference_arrays('mambavision')[f'mambavision_t_seg_feats_512.{i}'])


@pytest.mark.parametrize('with_cp', [False, True], ids=['plain', 'checkpointed'])
def test_gradients(with_cp, fill_parameters, reference_input, reference_arrays):
    stored = {
        name.partition(':')[2]: array
        for name, array in reference_arrays('gradients').items()
        if name.startswith('mambavision_small_grad:')
    }
    model = fill_parameters(Classifier(10, with_cp=with_cp, **SMALL), 42, published)
    logits = model(reference_input(42, 2, 3, 96, 96))
    weight = np.random.default_rng(1042).standard_normal(tuple(logits.shape)).astype(np.float32)
    (logits * torch.from_numpy(weight)).sum().backward()
    gradients = {published(name): parameter.grad for name, parameter in model.named_parameters()}
    assert gradients.keys() == stored.keys()
    for name, (norm, total) in stored.items():
        assert abs(gradients[name].norm().item() - norm) <= 1e-4 * norm, name
        assert abs(gradients[name].sum().item() - total) <= 1e-4 * norm, name


def test_names_and_shapes_are_the_published_ones():
    expected = json.loads((DATA / 'mambavision_t_keys.json').read_text())
    actual = {published(name): list(entry.shape) for name, entry in Classifier(1000).state_dict().items()}
    assert actual == expected


@pytest.mark.parametrize('arch', PARAMETERS)
def test_parameter_counts(arch):
    with torch.device('meta'):
        count = sum(p.numel() for p in Classifier(1000, arch=arch).parameters())
    assert abs(count / 1e6 - PARAMETERS[arch]) < 0.1
    assert count == dict(tiny=31_794_248, base=97_685_288).get(arch, count)


def test_every_published_size_is_counted():
    sizes = {id(arch) for arch in MambaVision.arch_zoo.values()}
    assert {id(MambaVision.arch_zoo[name]) for name in PARAMETERS} == sizes
