"""The elementary functions of the Triton kernels over the whole float32 range, in the interpreter, against float64."""

import numpy as np
import pytest
import torch

triton = pytest.importorskip('triton')
import triton.language as tl  # noqa: E402
from triton_runs import DEVICE, INTERPRETED, in_the_first_process, run_in_interpreter  # noqa: E402

from ssm_kernels.triton_utils import exp2, exp_neg_abs, sigmoid, softplus  # noqa: E402

NORMAL, ULP, BLOCK = 2.0**-126, 2.0**-23, 4096


@in_the_first_process
def test_in_the_interpreter():
    run_in_interpreter(__file__)


@triton.jit
def all_functions(x, y, n, BLOCK: tl.constexpr):
    o = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    b_x = tl.load(x + o)
    b_sig = sigmoid(b_x, False)
    tl.store(y + o, exp2(b_x, False))
    tl.store(y + n + o, exp_neg_abs(b_x, False))
    tl.store(y + 2 * n + o, softplus(b_x, False))
    tl.store(y + 3 * n + o, b_sig)
    tl.store(y + 4 * n + o, b_x * b_sig)
    tl.store(y + 5 * n + o, b_sig * (1.0 + b_x * (1.0 - b_sig)))


@pytest.fixture(scope='module')
def values():
    bits = np.arange(0, 2**32, 65537, dtype=np.uint64).astype(np.uint32).view(np.float32)
    edges = [0.0, 2.0**-126, 1.0, 17.0, 87.0, 87.3365, 88.0, 88.7228, 103.97, 126.0, 128.0, 149.0, 150.0, 1e4, 1e30]
    near = np.arange(-100, 101)
    points = [(np.float32(edge).view(np.int32) + near).astype(np.int32).view(np.float32) for edge in edges]
    points += [np.linspace(0, 130, 20_001, dtype=np.float32), np.array([0.0, 3.4028235e38, np.inf], np.float32)]
    x = np.concatenate([bits, *points, *(-p for p in points)])
    x = torch.from_numpy(np.pad(x, (0, -len(x) % BLOCK))).to(DEVICE)
    y = torch.full((6, len(x)), float('nan'), device=DEVICE)
    with np.errstate(all='ignore'):
        all_functions[(len(x) // BLOCK,)](x, y, len(x), BLOCK)
    names = ('exp2', 'exp_neg_abs', 'softplus', 'sigmoid', 'silu', 'slope')
    return x.cpu().numpy(), dict(zip(names, y.cpu().numpy(), strict=True))


def sigmoid64(x):
    return np.where(x < 0, np.exp(-np.abs(x)), 1.0) / (1 + np.exp(-np.abs(x)))


@pytest.mark.skipif(not INTERPRETED and not torch.cuda.is_available(), reason='needs the interpreter or a GPU')
@np.errstate(all='ignore')
def test_whole_range(values):
    """In ulp: exp2 1, exp(-|x|) and softplus 5; sigmoid and SiLU 3, with 1.3 |x| more where x < 0.

    The interpreter rounds twice in tl.fma, which gives exp(-|x|) and softplus 1.2 |x| more.
    """
    x, found = values
    nan = np.isnan(x)
    assert nan.any() and all(np.isnan(y[nan]).all() for y in found.values())
    keep = np.isfinite(x)
    x = x[keep].astype(np.float64)
    s = sigmoid64(x)
    exact = {
        'exp2': np.exp2(x),
        'exp_neg_abs': np.exp(-np.abs(x)),
        'softplus': np.logaddexp(0, x),
        'sigmoid': s,
        'silu': x * s,
        'slope': s * (1 + x * sigmoid64(-x)),
    }
    slack = 1 + 1.3 / 3 * np.clip(-x, 0, 89)
    rounded = 5 + (1.2 * np.clip(np.abs(x), 0, 104) if INTERPRETED else 0)
    most = {'exp2': 1.0, 'exp_neg_abs': rounded, 'softplus': rounded} | dict.fromkeys(
        ('sigmoid', 'silu', 'slope'), 3 * slack
    )
    for name, want in exact.items():
        got = found[name][keep].astype(np.float64)
        assert not np.isnan(got).any(), name
        size = np.abs(want)
        if name == 'slope':
            size = s + np.abs(x) * s * sigmoid64(-x) + np.abs(x) * s * (np.abs(x) < 18)
        unit = 2.0 ** np.floor(np.log2(np.clip(size, NORMAL, None))) * ULP
        fits = (np.abs(want) < 3.4028234e38) & ((x > -88.7) | (name not in ('sigmoid', 'silu', 'slope')))
        error = np.where(fits, np.abs(got - want) / unit, 0) / most[name]
        worst = np.argmax(error)
        print(f'{name}: {error[worst]:.3g} of its bound at {x[worst]}')
        assert error[worst] <= 1, (name, x[worst], got[worst], want[worst])
        if name in ('sigmoid', 'silu', 'slope'):
            assert (np.abs(got[x <= -88.7]) < 23 * NORMAL).all() and (got[x < -89] == 0).all(), name
