"""Reference arrays of the original models and the rule by which their parameters were filled (tests/data/README.md)."""

import zlib
from pathlib import Path

import numpy as np
import pytest
import torch

DATA = Path(__file__).parents[1] / 'data'


def _fill(name: str, shape: tuple, seed: int) -> torch.Tensor:
    v = np.random.default_rng(zlib.crc32(f'{seed}:{name}'.encode())).standard_normal(shape).astype(np.float32)
    last = name.rpartition('.')[2]
    if last in ('A_log', 'A_b_log'):
        v = np.log(np.arange(1, shape[1] + 1, dtype=np.float32)) + np.float32(0.1) * v
    elif last in ('D', 'D_b') or last == 'weight' and len(shape) == 1:
        v = 1 + np.float32(0.1) * v
    elif name.endswith(('dt_proj.bias', 'dt_proj_b.bias')):
        v = -4 + np.float32(0.5) * v
    elif last == 'running_var':
        v = 1 + np.float32(0.1) * abs(v)
    elif last == 'weight':
        v = v / np.sqrt(np.prod(shape[1:])).astype(np.float32)
    else:
        v = np.float32(0.1) * v
    return torch.from_numpy(np.asarray(v, dtype=np.float32))


@pytest.fixture
def fill_parameters():
    """Function (module, seed, rename=None) that fills a module's floating-point entries and puts it in eval mode.

    ``rename`` maps an entry's own name to the published one.
    """

    def fill(module, seed, rename=lambda name: name):
        entries = module.state_dict()
        for name, entry in entries.items():
            if entry.is_floating_point():
                entry.copy_(_fill(rename(name), tuple(entry.shape), seed))
        return module.eval()

    return fill


@pytest.fixture
def reference_input():
    """Function (seed, *shape) that draws a case's input."""

    def draw(seed, *shape):
        return torch.from_numpy(np.random.default_rng(seed).standard_normal(shape).astype(np.float32))

    return draw


@pytest.fixture(scope='session')
def reference_arrays():
    """Function (stem) that opens one file of arrays."""
    return lambda stem: np.load(DATA / f'{stem}.npz')


@pytest.fixture
def assert_agrees():
    """Function (actual, stored array): largest difference under 2e-5 of the stored array's standard deviation."""

    def check(actual, stored):
        if tuple(actual.shape) != stored.shape:
            actual = actual[:, ::8, ::3, ::3]
        assert tuple(actual.shape) == stored.shape
        error = np.abs(actual.detach().numpy() - stored).max() / stored.std()
        assert error < 2e-5, f'largest difference is {error:.1e} of the standard deviation'

    return check
