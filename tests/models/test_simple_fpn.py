"""SimpleFPN reproduces SimpleFeaturePyramid and takes every map size."""

import pytest
import torch
from mmengine.registry import MODELS

import mmvim  # noqa: F401


def build(**kwargs):
    return MODELS.build(dict(type='mmvim.SimpleFPN', **kwargs))


def test_reference(fill_parameters, reference_input, reference_arrays):
    neck = fill_parameters(build(in_channels=64, out_channels=32), 64)
    with torch.inference_mode():
        maps = neck(reference_input(64, 1, 64, 8, 12))
    for level, feature_map in zip(('p2', 'p3', 'p4', 'p5', 'p6'), maps, strict=True):
        stored = reference_arrays('vitdet')[f'simple_fpn.{level}']
        if level in ('p2', 'p3'):
            feature_map = feature_map[:, ::4]
        assert tuple(feature_map.shape) == stored.shape, level
        assert abs(feature_map.numpy() - stored).max() < 2e-5 * stored.std(), level


@pytest.mark.parametrize('size', [(1, 1), (5, 3), (2, 9)])
def test_odd_maps(size):
    maps = build(in_channels=16, out_channels=8)((torch.randn(2, 16, *size), torch.randn(2, 16, *size)))
    assert [tuple(m.shape[-2:]) for m in maps] == [
        (4 * size[0], 4 * size[1]),
        (2 * size[0], 2 * size[1]),
        size,
        (-(-size[0] // 2), -(-size[1] // 2)),
        (-(-size[0] // 4), -(-size[1] // 4)),
    ]


def test_without_convolutions_widths_follow_the_resampling():
    neck = build(in_channels=16, out_channels=None, num_outs=4)
    assert neck.out_channels == [4, 8, 16, 16]
    maps = neck(torch.randn(1, 16, 4, 4))
    assert [m.shape[1] for m in maps] == neck.out_channels


@pytest.mark.parametrize('kwargs', [dict(scales=(3.0,)), dict(scales=(8.0,)), dict(scales=(0.0,)), dict(num_outs=3)])
def test_bad_arguments(kwargs):
    with pytest.raises(ValueError, match='scales'):
        build(in_channels=16, **kwargs)
