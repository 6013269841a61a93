"""``scan_backend`` chooses the backend of every operator of ssm_kernels that a model runs."""

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
