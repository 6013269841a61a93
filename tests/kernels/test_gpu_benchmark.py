"""The benchmark for GPU machines, as far as a machine without one can tell: its models, its rows, its refusals."""

import os
import subprocess
import sys
from pathlib import Path

import models
import pytest
import torch

BENCHMARKS = Path(__file__).parents[2] / 'kernels' / 'benchmarks'
no_gpu = pytest.mark.skipif(torch.cuda.is_available() or torch.xpu.is_available(), reason='there is a GPU')


def run(*command, **environment):
    return subprocess.run(command, capture_output=True, text=True, timeout=300, env=os.environ | environment)


@pytest.mark.parametrize('pipeline', ['ours', 'eager'])
def test_its_vim_is_mmvims(pipeline):
    from mmvim.models import VisionMamba

    torch.manual_seed(0)
    theirs = VisionMamba(dict(embed_dims=192, depth=2), img_size=48, cls_token=None, out_type='raw').eval()
    ours = models.Vim(48, pipeline, depth=2).eval()
    ours.load_state_dict(theirs.state_dict())
    image = torch.randn(2, 3, 48, 48)
    with torch.no_grad():
        torch.testing.assert_close(ours(image), theirs(image)[0], rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize('attention', ['sdpa', 'materialised'])
def test_its_deit_is_timms(attention):
    timm = pytest.importorskip('timm')
    torch.manual_seed(0)
    theirs = timm.create_model(
        'deit_tiny_patch16_224', img_size=48, num_classes=0, global_pool='', class_token=False, depth=2
    ).eval()
    ours = models.DeiT(48, attention, depth=2).eval()
    ours.load_state_dict(theirs.state_dict())
    image = torch.randn(2, 3, 48, 48)
    with torch.no_grad():
        torch.testing.assert_close(ours(image), theirs(image), rtol=1e-4, atol=1e-4)


def test_published_pipeline_equals_ours(monkeypatch):
    """mamba_ssm's function replaced by this package's of the same signature: checks flips, layouts and sums."""
    import ssm_kernels

    known = {'selective_scan_fn': ssm_kernels.selective_scan_fn}
    monkeypatch.setattr(models, 'peer', lambda package, name: known.get(name))
    torch.manual_seed(0)
    ours, published = models.VimMixer(32, 'ours'), models.VimMixer(32, 'mamba_ssm')
    published.load_state_dict(ours.state_dict())
    x = torch.randn(2, 11, 32)
    with torch.no_grad():
        torch.testing.assert_close(published(x), ours(x), rtol=1e-4, atol=1e-5)


@pytest.mark.slow
def test_every_row_runs():
    result = run(sys.executable, BENCHMARKS / 'bench_gpu.py', '--dry-run', '--pixels', '48', '--batches', '2')
    assert result.returncode == 0, result.stderr
    lines = result.stdout.splitlines()[1:]
    for what in ('scan both', 'convolution both', 'add and norm'):
        for way in ('forward', 'backward'):
            assert f'{what} {way} batch 2 tokens 9 dtype bfloat16 ours eager' in lines
    for way in ('forward', 'forward and backward'):
        sides = 'ours deit sdpa deit materialised'
        assert f'block {way} batch 2 tokens 9 dtype bfloat16 {sides} vim eager' in lines
        assert f'backbone {way} batch 2 pixels 48 dtype bfloat16 {sides}' in lines
    assert not any(' us' in line or line.startswith('left out') for line in lines)


@no_gpu
def test_without_a_gpu_it_says_so():
    result = run(sys.executable, BENCHMARKS / 'bench_gpu.py')
    assert result.returncode == 1 and 'needs a GPU that PyTorch sees' in result.stderr and not result.stdout


@no_gpu
@pytest.mark.skipif(sys.platform == 'win32', reason='bash')
def test_the_script_parses_and_says_what_is_missing():
    script = BENCHMARKS / 'run_gpu.sh'
    assert run('bash', '-n', script).returncode == 0 and os.access(script, os.X_OK)
    result = run(script, PYTHON=sys.executable)
    assert result.returncode == 1 and 'sees no GPU' in result.stderr
