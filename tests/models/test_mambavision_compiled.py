"""MambaVision as a whole under torch.compile and torch.export."""

import shutil

import pytest
import torch

from mmvim.models import MambaVision

SMALL = dict(
    arch=dict(embed_dims=16, stem_channels=8, depths=(1, 1, 2, 1), num_heads=(1, 2, 2, 4)), window_sizes=(8, 8, 4, 3)
)


@pytest.fixture
def images():
    return torch.randn(2, 3, 96, 80, generator=torch.Generator().manual_seed(1))


def build(**settings):
    torch.manual_seed(0)
    torch._dynamo.reset()
    return MambaVision(**{**SMALL, **settings})


def check_inference(model, images, backend):
    compiled = torch.compile(model.eval(), fullgraph=True, backend=backend)
    with torch.no_grad():
        for ours, want in zip(compiled(images), model(images), strict=True):
            torch.testing.assert_close(ours, want, rtol=1e-4, atol=1e-5)


def gradients(call, model, images):
    model.zero_grad()
    sum(y.square().mean() for y in call(images)).backward()
    return {name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None}


def check_training(model, images, backend):
    model.train()
    want = gradients(model, model, images)
    ours = gradients(torch.compile(model, fullgraph=True, backend=backend), model, images)
    assert ours.keys() == want.keys() == dict(model.named_parameters()).keys()
    largest = max(gradient.norm() for gradient in want.values())
    for name, gradient in want.items():
        # in front of BatchNorm a bias has no gradient but rounding
        assert (ours[name] - gradient).norm() <= 1e-4 * gradient.norm() + 1e-6 * largest, name


def test_compile_fullgraph_inference(images):
    check_inference(build(), images, 'aot_eager')


def test_compile_fullgraph_training(images):
    check_training(build(out_type='avg_featmap', with_cp=True), images, 'aot_eager')


@pytest.mark.slow  # python -m pytest tests/models -m slow
@pytest.mark.skipif(shutil.which('g++') is None, reason='inductor needs a C++ compiler')
def test_compile_fullgraph_inductor(images):
    check_inference(build(), images, 'inductor')
    check_training(build(), images, 'inductor')


def test_export_with_dynamic_batch(images, tmp_path):
    model = build().eval()
    batch = torch.export.Dim('batch', min=1, max=64)
    with torch.no_grad():
        program = torch.export.export(model, (images,), dynamic_shapes=({0: batch},))
    torch.export.save(program, tmp_path / 'mambavision.pt2')
    loaded = torch.export.load(tmp_path / 'mambavision.pt2').module()
    for count in (1, 2, 3):
        x = torch.randn(count, 3, 96, 80)
        with torch.no_grad():
            for ours, want in zip(loaded(x), model(x), strict=True):
                torch.testing.assert_close(ours, want, rtol=1e-4, atol=1e-5)
