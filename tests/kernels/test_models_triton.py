"""Whole backbones on the Triton kernels, forward and backward, against float64 on plain PyTorch."""

import dataclasses

import pytest
import torch

pytest.importorskip('triton')
from tolerance import error  # noqa: E402
from triton_runs import COMPILED, DEVICE, in_the_first_process, run_compiled  # noqa: E402

import mmvim  # noqa: E402, F401
from mmvim.models import HierVim, MambaVision, VisionMamba  # noqa: E402
from ssm_kernels.ops import add_rms_norm, causal_conv1d, mamba_inner, selective_scan  # noqa: E402

VIM = dict(img_size=(48, 32), out_type='featmap')
MODELS = {
    'vim-narrow': lambda **k: VisionMamba(dict(embed_dims=32, depth=4, d_state=4), **VIM, **k),
    'vim-tiny': lambda **k: VisionMamba('tiny', **VIM, **k),
    'mambavision-tiny': lambda **k: MambaVision('tiny', window_sizes=(8, 8, 4, 2), **k),
    'hier-vim-tiny': lambda **k: HierVim('tiny', **k),
}
QUICK = 'vim-narrow'
gpu = pytest.mark.compiled if COMPILED else pytest.mark.gpu


@in_the_first_process
@pytest.mark.compiled
def test_compiled():
    run_compiled(__file__)


@in_the_first_process
@pytest.mark.slow
def test_compiled_in_full():
    run_compiled(__file__, marks='compiled and slow')


@pytest.fixture
def triton_takes_every_device(monkeypatch):
    for room in (add_rms_norm, causal_conv1d, mamba_inner, selective_scan):
        rows = [dataclasses.replace(b, why_not=lambda x, n: None) if b.name == 'triton' else b for b in room.BACKENDS]
        monkeypatch.setattr(room, 'BACKENDS', tuple(rows))


def run(model, image):
    """Outputs and gradients of all parameters, by name."""
    maps = model(image)
    seeds = [torch.randn(x.shape, generator=torch.Generator().manual_seed(i)) for i, x in enumerate(maps)]
    sum((x * s.to(x)).sum() for x, s in zip(maps, seeds, strict=True)).backward()
    grads = {name: p.grad for name, p in model.named_parameters() if p.grad is not None}
    return {f'map {i}': x.detach() for i, x in enumerate(maps)} | grads


@gpu
@pytest.mark.parametrize(
    'name', [name if name == QUICK or not COMPILED else pytest.param(name, marks=pytest.mark.slow) for name in MODELS]
)
def test_forward_and_backward(name, triton_takes_every_device):
    image = torch.randn(2, 3, 48, 32, generator=torch.Generator().manual_seed(0))
    results = []
    torch.manual_seed(0)
    weights = MODELS[name]().state_dict()
    for backend, dtype, device in (
        ('torch', torch.float64, 'cpu'),
        ('torch', torch.float32, 'cpu'),
        ('triton', torch.float32, DEVICE),
    ):
        model = MODELS[name](scan_backend=backend).eval().to(device, dtype)
        model.load_state_dict(weights)
        results.append({n: x.cpu() for n, x in run(model, image.to(device, dtype)).items()})
    if COMPILED:
        from compiled import launches

        assert launches.counted['scan_forward_kernel'] and launches.counted['scan_backward_kernel']
    exact, plain, ours = results
    assert exact.keys() == ours.keys() and len(ours) > 20
    # the parts that are not ours round as well, so the bound follows the worst tensor of plain PyTorch
    allowed = 4 * max(error(x, exact[n]) for n, x in plain.items() if exact[n].abs().max() > 1e-6)
    off = {n: error(x, exact[n]) for n, x in ours.items() if exact[n].abs().max() > 1e-6}
    assert {n: e for n, e in off.items() if not e <= allowed} == {}
