"""Interpolated positions are kept between images at inference, and never outlive the table that they were made of."""

import copy
import pickle

import pytest
import torch

from mmvim.models import VisionMamba, VisionTransformer
from mmvim.models.layers import positions

IMAGE = torch.linspace(-1, 1, 3 * 48 * 32).view(1, 3, 48, 32)


@pytest.fixture(params=['vim', 'deit'])
def model(request):
    torch.manual_seed(0)
    if request.param == 'vim':
        model = VisionMamba(dict(embed_dims=16, depth=1), img_size=32, out_type='featmap')
    else:
        arch = dict(embed_dims=16, depth=1, num_heads=2)
        model = VisionTransformer(arch, img_size=32, out_type='featmap')
    torch.nn.init.normal_(model.pos_embed)
    return model.eval()


@pytest.fixture
def made(monkeypatch):
    """Grids for which positions were interpolated."""
    grids, resize = [], positions.resize_pos_embed

    def count(table, source, target, mode):
        grids.append(tuple(target))
        return resize(table, source, target, mode)

    monkeypatch.setattr('mmvim.models.base.resize_pos_embed', count)
    return grids


@pytest.mark.parametrize('mode', [torch.no_grad, torch.inference_mode])
def test_a_grid_is_interpolated_once(model, made, mode):
    with torch.enable_grad():
        (expected,) = model(IMAGE)
    made.clear()
    with mode():
        for _ in range(3):
            torch.testing.assert_close(model(IMAGE)[0], expected, rtol=0, atol=1e-6)
        model(IMAGE.transpose(2, 3))
    assert made == [(3, 2), (2, 3)]


def test_training_interpolates_each_time_and_reaches_the_table(model, made):
    with torch.no_grad():
        model(IMAGE)
    for _ in range(2):
        model.zero_grad()
        model(IMAGE)[0].square().sum().backward()
        assert model.pos_embed.grad.abs().sum() > 0
    assert len(made) == 3


@pytest.mark.parametrize('write', ['copy_', 'data', 'load', 'assign'])
def test_a_changed_table_counts_at_once(model, write):
    changed = torch.randn_like(model.pos_embed)
    with torch.no_grad():
        (before,) = model(IMAGE)
        if write == 'copy_':
            model.pos_embed.copy_(changed)
        elif write == 'data':  # as averages of weights are swapped in: no version counter moves
            model.pos_embed.data.copy_(changed)
        elif write == 'load':
            model.load_state_dict(model.state_dict() | {'pos_embed': changed})
        else:
            model.pos_embed = torch.nn.Parameter(changed)
        (after,) = model(IMAGE)
    (expected,) = model(IMAGE)
    torch.testing.assert_close(after, expected, rtol=0, atol=1e-6)
    assert (after - before).abs().max() > 1e-3


def test_few_grids_are_kept_and_none_is_copied(model, made):
    with torch.no_grad():
        for height in range(48, 48 + 16 * 6, 16):
            model(torch.zeros(1, 3, height, 32))
    assert len(model.position_cache.held) == 4
    for other in (copy.deepcopy(model), pickle.loads(pickle.dumps(model))):
        assert not other.position_cache.held
    model.to(torch.float64)
    with torch.no_grad():
        assert model(IMAGE.double())[0].dtype == torch.float64


def test_kept_tables_have_a_limit_in_bytes(model, made):
    cache = model.position_cache
    with torch.no_grad():
        model(torch.zeros(1, 3, 64, 64))
        one = cache.nbytes
        cache.max_bytes = 2 * one
        for width in (48, 32, 64, 48):
            model(torch.zeros(1, 3, 64, width))
            assert 0 < cache.nbytes <= cache.max_bytes
        cache.max_bytes = one // 2
        cache.held.clear()
        made.clear()
        for _ in range(2):
            model(torch.zeros(1, 3, 64, 64))
    assert made == [(4, 4)] * 2 and not cache.held


def test_reading_a_map_builds_nothing_as_long_as_the_sequence():
    """Class tokens are cut out by slices, not by a list of all other tokens."""
    model = VisionMamba(dict(embed_dims=16, depth=1), img_size=32, out_type='featmap')
    with torch.no_grad(), torch.profiler.profile() as profile:
        model(IMAGE)
    called = {event.name for event in profile.events()}
    assert 'aten::slice' in called and not called & {'aten::index', 'aten::index_select', 'aten::gather'}
