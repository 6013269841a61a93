"""The elementary functions of the Numba kernels over the whole float32 range, for every width of vector.

AVX2, AVX and the baseline run as they are. Where the CPU has no AVX-512, its arithmetic runs in split vectors with the
look-up emulated (see vector_values.py).
"""

import os
import platform
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
import torch.nn.functional as F

pytest.importorskip('numba')
from ssm_kernels import cpu_vectors  # noqa: E402

PROGRAM = Path(__file__).parent / 'vector_values.py'
X86 = platform.machine() in ('x86_64', 'AMD64')
AVX512 = '+avx512f' in cpu_vectors._FEATURES
# by name: lanes of a tile, what Numba is told to compile for, arguments of the program
TARGETS = {
    'avx512': (32, {}, () if AVX512 else ('emulate-avx512',)),
    'avx2': (16, {'NUMBA_CPU_NAME': 'haswell', 'NUMBA_CPU_FEATURES': '+avx,+avx2,+fma'}, ()),
    'avx': (16, {'NUMBA_CPU_NAME': 'sandybridge', 'NUMBA_CPU_FEATURES': '+avx'}, ()),
    'baseline': (8, {'NUMBA_CPU_NAME': 'generic', 'NUMBA_CPU_FEATURES': ''}, ()),
}
if not X86:
    TARGETS = {'host': (cpu_vectors.LANES, {}, ())}
FUSED = ('avx512', 'avx2', 'host')  # multiply and add with one rounding
ULP = 2.0**-23  # of numbers from 1 to 2
NORMAL = 2.0**-126  # the smallest normal number


def whole_range() -> np.ndarray:
    """float32 of every exponent, all neighbours of the points where something switches over, and special values."""
    bits = np.arange(0, 2**32, 16411, dtype=np.uint64).astype(np.uint32)
    edges = [0.0, 2.0**-126, 2.0**-24, 1.0, 1.278, 17.0, 64.0, 87.0, 87.3365, 88.0, 88.7228, 103.97, 125.0, 126.0]
    edges += [127.0, 127.9375, 128.0, 149.0, 150.0, 1e4, 1e30, np.finfo(np.float32).max, np.inf]
    edges += [k / cpu_vectors.LOG2E for k in (125, 126, 127, 127.9375, 128)]
    edges += [(k + 0.5) / 16 for k in range(-3, 32)]  # where rounding to the table's steps changes
    near = np.arange(-600, 601)
    points = [(np.float32(edge).view(np.int32) + near).astype(np.int32).view(np.float32) for edge in edges]
    dense = np.linspace(-130, 130, 100_001, dtype=np.float32)
    zeros = np.array([0.0, -0.0], np.float32)
    return np.concatenate([bits.view(np.float32), *points, *(-p for p in points), dense, zeros])


@pytest.fixture(scope='module')
def x(tmp_path_factory):
    path = tmp_path_factory.mktemp('vectors') / 'x.npy'
    np.save(path, whole_range())
    return path


@pytest.fixture(
    scope='module', params=[pytest.param(t, marks=[pytest.mark.slow] * (t in ('avx', 'baseline'))) for t in TARGETS]
)
def values(request, x):
    """Inputs and the functions' values for one target."""
    if request.param in ('avx', 'avx2') and f'+{request.param}' not in cpu_vectors._FEATURES:
        pytest.skip(f'this CPU has no {request.param}')
    lanes, environment, options = TARGETS[request.param]
    out = x.with_name(f'{request.param}.npz')
    environment = os.environ | {'PYTHONPATH': str(Path(cpu_vectors.__file__).parents[1])} | environment
    done = subprocess.run(
        [sys.executable, PROGRAM, x, out, *options], env=environment, capture_output=True, text=True, timeout=600
    )
    assert done.returncode == 0, done.stderr[-2000:]
    found = dict(np.load(out))
    assert found.pop('lanes') == lanes
    return np.load(x), found, request.param in FUSED


def sigmoid(x):
    return np.where(x < 0, np.exp(-np.abs(x)), 1.0) / (1 + np.exp(-np.abs(x)))


def silu_slope(x):
    return sigmoid(x) * (1 + x * sigmoid(-x))


def worst(name, got, exact, unit, most):
    """Largest error in units in the last place, and where; ``most`` is what is promised."""
    error = np.abs(got.astype(np.float64) - exact) / unit
    where = np.argmax(error)
    print(f'{name}: {error[where]:.3g} ulp')
    assert error[where] <= most, (name, where, got[where], exact[where], error[where])


def ulp(exact):
    """The unit in the last place of float32 at exact, no finer than that of the normal numbers."""
    return 2.0 ** np.floor(np.log2(np.maximum(np.abs(exact), NORMAL))) * ULP


@pytest.fixture
def finite(values):
    x, found, fused = values
    keep = np.isfinite(x)
    return x[keep].astype(np.float64), {name: y[keep] for name, y in found.items()}, fused


@np.errstate(over='ignore', under='ignore', invalid='ignore')
def test_exp2(finite):
    """2.5 ulp from -125 to 128, 0 below, from 128 on inf; the tame one 2.5 ulp over its whole domain."""
    t, found, _ = finite
    inside = (t >= -125) & (t < 128)
    exact = np.exp2(t[inside])
    worst('exp2', found['exp2'][inside], exact, ulp(exact), 2.5)
    assert (found['exp2'][t < -125] == 0).all()
    assert (found['exp2'][t >= 128] == np.inf).all()
    exact = np.exp2(np.clip(t, -126, 126))
    worst('exp2_tame', found['exp2_tame'], exact, ulp(exact), 2.5)


@np.errstate(over='ignore', under='ignore', invalid='ignore')
def test_exp_neg(finite):
    """3 ulp up to 87, 0 beyond; without FMA 1.2 |x| more, from the rounding of x log2(e)."""
    x, found, fused = finite
    x = np.maximum(x, 0)
    exact = np.where(x > 87, 0, np.exp(-x))
    worst('exp_neg', found['exp_neg'], exact, ulp(exact) * (1 if fused else 1 + 1.2 / 3 * np.minimum(x, 87)), 3)


@np.errstate(over='ignore', under='ignore', invalid='ignore')
def test_softplus(finite):
    """4 ulp from -87 on, 0 before, as exp(-87) is 1.4 times the smallest normal number; without FMA as exp_neg."""
    x, found, fused = finite
    exact = np.where(x < -87, 0, np.logaddexp(0, x))
    worst('softplus', found['softplus'], exact, ulp(exact) * (1 if fused else 1 + 1.2 / 4 * np.clip(-x, 0, 87)), 4)


@np.errstate(over='ignore', under='ignore', invalid='ignore')
def test_sigmoid_and_silu(finite):
    """3 ulp and 1.3 |x| more where x < 0, from the rounding of x log2(e); 0 from -88.8 on, where exp(-x) overflows."""
    x, found, _ = finite
    clear = x >= -88.7
    slack = 1 + 1.3 / 3 * np.clip(-x, 0, None)
    exact = sigmoid(x)
    worst('sigmoid', found['sigmoid'][clear], exact[clear], (ulp(exact) * slack)[clear], 3)
    exact = x * exact
    worst('silu', found['silu'][clear], exact[clear], (ulp(exact) * slack)[clear], 3)
    for name in ('sigmoid', 'silu', 'silu_slope'):
        assert (np.abs(found[name][~clear]) < 23 * NORMAL).all(), name
        assert (found[name][x < -88.8] == 0).all(), name


@np.errstate(over='ignore', under='ignore', invalid='ignore')
def test_slope_of_silu(finite):
    """4 ulp of its terms, s and x s (1 - s), and 1.3 |x| more where x < 0."""
    x, found, _ = finite
    clear = x >= -88.7
    s = sigmoid(x)
    terms = ulp(s + np.abs(x) * s * sigmoid(-x)) + ulp(1.0) / 2 * s * np.abs(x) * (x > 0) * (x < 18)
    slack = 1 + 1.3 / 4 * np.clip(-x, 0, None)
    worst('silu_slope', found['silu_slope'][clear], silu_slope(x)[clear], (terms * slack)[clear], 4)


def test_special_values_are_pytorchs(values):
    x, found, _ = values
    nan = np.isnan(x)
    assert nan.any() and len(set(x[nan].view(np.int32))) > 50  # of many payloads and both signs
    for name, y in found.items():
        assert np.isnan(y[nan]).all(), name
        assert np.isnan(y[~nan]).sum() == np.isnan(y[np.isinf(x)]).sum(), name
    t = torch.from_numpy(x).requires_grad_()
    for name, function in (('sigmoid', torch.sigmoid), ('silu', F.silu)):
        want = function(t.detach()).numpy()
        exact = np.isinf(x) | (x == 0) | (x < -89) | (x > 100)
        np.testing.assert_array_equal(found[name][exact], want[exact], name)
        signed = exact & ~np.isnan(want)
        np.testing.assert_array_equal(np.signbit(found[name][signed]), np.signbit(want[signed]), name)
    (slope,) = torch.autograd.grad(F.silu(t).sum(), t)
    np.testing.assert_array_equal(found['silu_slope'][np.isinf(x)], slope.numpy()[np.isinf(x)])
    for value, want in ((np.inf, np.inf), (-np.inf, 0)):
        np.testing.assert_allclose(found['softplus'][x == value], want, rtol=1e-5)
    for value, want in ((np.inf, np.inf), (-np.inf, 0)):
        assert (found['exp2'][x == value] == want).all()
