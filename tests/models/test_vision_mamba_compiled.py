"""Vim under torch.compile, torch.export and autocast."""

import shutil

import pytest
import torch

from mmvim.models import VisionMamba


def build(arch):
    torch.manual_seed(0)
    return VisionMamba(arch, img_size=64, cls_token=None, out_type='featmap', rotary='both', feature_source='residual')


@pytest.fixture(scope='module')
def vim():
    return build(dict(embed_dims=192, depth=4))


@pytest.fixture(scope='module')
def vim_ti():
    return build('tiny')


@pytest.fixture(scope='module')
def images():
    return torch.randn(2, 3, 64, 48, generator=torch.Generator().manual_seed(1))


def gradients(call, vim, images):
    vim.zero_grad()
    (y,) = call(images)
    y.square().mean().backward()
    grads = {name: p.grad.clone() for name, p in vim.named_parameters() if p.grad is not None}
    vim.zero_grad(set_to_none=True)
    return grads


def check_inference(vim, images, backend):
    torch._dynamo.reset()
    compiled = torch.compile(vim, fullgraph=True, backend=backend)
    vim.eval()
    with torch.no_grad():
        torch.testing.assert_close(compiled(images)[0], vim(images)[0], rtol=1e-4, atol=1e-5)


def check_training(vim, images, backend):
    torch._dynamo.reset()
    compiled = torch.compile(vim, fullgraph=True, backend=backend)
    vim.train()
    ours, want = gradients(compiled, vim, images), gradients(vim, vim, images)
    assert ours.keys() == want.keys() and len(want) > 10 * len(vim.layers)
    for name, grad in want.items():
        assert (ours[name] - grad).norm() <= 1e-4 * grad.norm(), name


def test_compile_fullgraph_inference(vim, images):
    check_inference(vim, images, 'aot_eager')


@pytest.mark.slow
def test_compile_fullgraph_training_of_three_blocks(images):
    torch.manual_seed(0)
    options = dict(cls_token='middle', out_type='featmap', drop_path_rate=0.0, with_cp=True)
    check_training(VisionMamba(dict(embed_dims=48, depth=3), img_size=64, **options), images, 'aot_eager')


@pytest.mark.slow  # python -m pytest tests/models -m slow
def test_compile_fullgraph(vim_ti, images):
    check_inference(vim_ti, images, 'aot_eager')
    check_training(vim_ti, images, 'aot_eager')


@pytest.mark.slow
@pytest.mark.skipif(shutil.which('g++') is None, reason='inductor needs a C++ compiler')
def test_compile_fullgraph_inductor(vim_ti, images):
    check_inference(vim_ti, images, 'inductor')
    check_training(vim_ti, images, 'inductor')


def test_export_with_dynamic_batch(vim, images, tmp_path):
    vim.eval()
    batch = torch.export.Dim('batch', min=1, max=64)
    with torch.no_grad():
        program = torch.export.export(vim, (images,), dynamic_shapes=({0: batch},))
    torch.export.save(program, tmp_path / 'vim.pt2')
    loaded = torch.export.load(tmp_path / 'vim.pt2').module()
    for count in (1, 2, 3):
        x = torch.randn(count, 3, 64, 48)
        with torch.no_grad():
            torch.testing.assert_close(loaded(x)[0], vim(x)[0], rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize('compiled', [False, True], ids=['eager', 'compiled'])
def test_autocast_loses_what_bfloat16_loses(vim, images, compiled):
    """Activations are bfloat16; parameters of scan and norm, the state and the residual stream stay float32."""
    torch._dynamo.reset()
    vim.eval()
    call = torch.compile(vim, fullgraph=True, backend='aot_eager') if compiled else vim
    with torch.no_grad():
        exact = vim(images)[0]
        with torch.autocast('cpu', dtype=torch.bfloat16):
            y = call(images)[0]
    assert y.dtype == torch.float32  # the residual stream
    error = (y - exact).norm() / exact.norm()
    assert 1e-5 < error < 2**-7


def test_autocast_trains_in_float32_parameters(vim, images):
    vim.train()
    want = gradients(vim, vim, images)
    with torch.autocast('cpu', dtype=torch.bfloat16):
        ours = gradients(vim, vim, images)
    for name, grad in want.items():
        assert ours[name].dtype == torch.float32
        assert torch.nn.functional.cosine_similarity(ours[name].flatten(), grad.flatten(), dim=0) > 0.98, name
