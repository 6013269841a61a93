"""``scan_backend`` chooses the backend of every operator of ssm_kernels that a model runs."""

import subprocess
import sys

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode

from mmvim.models import HierVim, MambaVision, VisionMamba


class Operators(TorchDispatchMode):
    """The operators of ssm_kernels that were called within it."""

    def __init__(self):
        super().__init__()
        self.called = set()

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        if func.namespace == 'ssm_kernels':
            self.called.add(func.name().split('::')[1])
        return func(*args, **(kwargs or {}))


BUILD = {
    **{
        f'vim-{directions}': lambda directions=directions, **settings: VisionMamba(
            dict(embed_dims=16, depth=2), img_size=32, directions=directions, **settings
        )
        for directions in VisionMamba.DIRECTIONS
    },
    'hier-vim': lambda **settings: HierVim(dict(embed_dims=8, depths=(1, 1, 1, 1)), **settings),
    'mambavision': lambda **settings: MambaVision(
        dict(embed_dims=16, stem_channels=8, depths=(1, 1, 2, 2), num_heads=(1, 2, 2, 4)), **settings
    ),
}


@pytest.mark.parametrize('training', [False, True])
@pytest.mark.parametrize('name', BUILD)
def test_one_switch_for_all_operators(name, training):
    called = {}
    for backend in ('torch', 'numba'):
        model = BUILD[name](scan_backend=backend).train(training)
        with Operators() as operators, torch.set_grad_enabled(training):
            outputs = model(torch.randn(2, 3, 64, 64))
            if training:
                sum(y.square().sum() for y in outputs).backward()
        called[backend] = operators.called
    assert called['torch'] == set()
    assert called['numba'] and all('numba' in operator for operator in called['numba'])
    assert not name.startswith('vim') or any('add_rms_norm' in operator for operator in called['numba'])


def test_the_safe_way_needs_no_numba(tmp_path):
    """One that cannot be imported is missed by the call that needs it only."""
    (tmp_path / 'numba.py').write_text("raise ImportError('Numba needs another NumPy')")
    code = (
        f'import sys; sys.path.insert(0, {str(tmp_path)!r}); import torch; from mmvim.models import VisionMamba;'
        'build = lambda backend: VisionMamba(dict(embed_dims=16, depth=1), scan_backend=backend);'
        'run = lambda backend: build(backend)(torch.zeros(1, 3, 32, 32));'
        "run('torch'); print('safe'); run(None)"
    )
    result = subprocess.run([sys.executable, '-c', code], capture_output=True, text=True, timeout=300)
    assert result.stdout == 'safe\n' and 'ImportError: Numba needs another NumPy' in result.stderr
