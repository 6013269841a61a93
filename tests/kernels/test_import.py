"""Importing the package is light: backends load on first use."""

import inspect
import subprocess
import sys

import ssm_kernels

HEAVY = ('triton', 'numba', 'torch._dynamo', 'mmengine', 'mmcv')


def test_import_loads_torch_alone():
    code = f'import sys, ssm_kernels; print([m for m in {HEAVY} if m in sys.modules])'
    result = subprocess.run([sys.executable, '-c', code], capture_output=True, text=True, check=True)
    assert result.stdout.strip() == '[]'


def test_backends_load_on_first_use():
    code = (
        'import sys, torch, ssm_kernels; x = torch.ones(1, 2, 4); s = torch.ones(1, 2, 3); '
        "ssm_kernels.selective_scan(x, x, -torch.ones(4, 3), s, s, backend='torch'); print('numba' in sys.modules); "
        "ssm_kernels.selective_scan(x, x, -torch.ones(4, 3), s, s); print('numba' in sys.modules)"
    )
    result = subprocess.run([sys.executable, '-c', code], capture_output=True, text=True, check=True)
    assert result.stdout.split() == ['False', 'True']


def test_names_of_functions_are_functions_alone():
    for name in ('selective_scan', 'causal_conv1d', 'add_rms_norm', 'mamba_inner'):
        assert inspect.isfunction(getattr(ssm_kernels, name))
        assert inspect.ismodule(getattr(ssm_kernels.ops, name))
        assert f'ssm_kernels.{name}' not in sys.modules
