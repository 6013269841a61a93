"""Inputs and gates far from zero: every op with a SiLU, forward and backward, on every backend, against float64."""

# K directions, B batch, L tokens, D channels, N state size, R rank of dt

import importlib.util

import pytest
import torch
import torch.nn.functional as F

from ssm_kernels import (
    DirectionWeights,
    add_rms_norm,
    bidirectional_causal_conv1d,
    bidirectional_selective_scan,
    causal_conv1d,
    causal_conv1d_fn,
    mamba_inner,
    same_conv1d,
    selective_scan,
    selective_scan_fn,
)

NO_NUMBA = importlib.util.find_spec('numba') is None
BACKENDS = ['torch', pytest.param('numba', marks=pytest.mark.skipif(NO_NUMBA, reason='needs numba'))]
VALUES = (-88.0, -88.7, -89.0, -100.0, -1e4, -1e30, 89.0, 1e4, 1e30)
B, L, D, N, R = 2, 9, 20, 3, 2


def draw(*shape, seed=0, low=0.5, high=1.5):
    """Positive and about 1, so that what an extreme value meets cannot cancel."""
    return torch.rand(*shape, generator=torch.Generator().manual_seed(seed)) * (high - low) + low


def scattered(value, *shape, seed=0):
    """Ordinary numbers, every third one replaced by the extreme value."""
    x = torch.randn(*shape, generator=torch.Generator().manual_seed(seed))
    x.flatten()[::3] = value
    return x


def scan_inputs(value, K=None, channels_first=False):
    lead = () if K is None else (K,)
    x = {
        'u': draw(*lead, B, L, D, seed=1),
        'dt': draw(*lead, B, L, D, seed=2),
        'A': -draw(*lead, D, N, seed=3),
        'B': draw(*lead, B, L, N, seed=4),
        'C': draw(*lead, B, L, N, seed=5),
        'D': draw(*lead, D, seed=6),
        'z': scattered(value, B, L, D, seed=7),
        'dt_bias': draw(*lead, D, seed=8),
    }
    if channels_first:
        x = {name: t.mT.contiguous() if t.dim() == 3 else t for name, t in x.items()}
        x['delta'], x['delta_bias'] = x.pop('dt'), x.pop('dt_bias')
    return x


def conv_inputs(value, K=None):
    lead = () if K is None else (K,)
    # one tap of 1 and small others: what comes before the activation is extreme, and its size is x's
    weight = draw(*lead, D, 4, low=0.0, high=1e-3)
    weight[..., -1] = 1.0
    return {'x': scattered(value, B, L, D), 'weight': weight, 'bias': draw(*lead, D, seed=1) * 1e-3}


def inner_inputs(value, gate, K):
    weights = []
    value = value if gate else min(value, 1e18)  # the gradient of x_proj has its square
    size = 1.0 if gate else max(1.0, abs(value))  # (dt, B, C) of ordinary size
    for k in range(K):
        conv = conv_inputs(1.0)
        x_proj, dt_proj = draw(R + 2 * N, D, seed=k) / (D * size), draw(D, R, seed=k + 9)
        A, skip, dt_bias = -draw(D, N, seed=k), draw(D, seed=k + 3), draw(D, seed=k + 5)
        weights += DirectionWeights(conv['weight'], conv['bias'], x_proj, dt_proj, A, skip, dt_bias)
    x, z = draw(B, L, D), scattered(value, B, L, D, seed=4)
    return {'x': x, 'z': z} | {str(i): w for i, w in enumerate(weights)} if gate else {
        'x': z, 'z': x, **{str(i): w for i, w in enumerate(weights)}
    }  # fmt: skip


def inner(x, z, backend, **weights):
    weights = list(weights.values())
    return mamba_inner(x, z, [weights[i : i + 7] for i in range(0, len(weights), 7)], backend=backend)


def scan_fn(backend, **x):
    if backend == 'torch' and x['u'].dtype != torch.float64:
        pytest.skip('takes the first backend')
    return selective_scan_fn(**x, delta_softplus=True)


def conv_fn(x, weight, bias, backend):
    if backend == 'torch' and x.dtype != torch.float64:
        pytest.skip('takes the first backend')
    return causal_conv1d_fn(x.mT, weight, bias, 'silu').mT


OPS = {
    'causal_conv1d': (causal_conv1d, conv_inputs),
    'causal_conv1d-reverse': (lambda **x: causal_conv1d(**x, reverse=True), conv_inputs),
    'same_conv1d': (same_conv1d, conv_inputs),
    'causal_conv1d_fn': (conv_fn, conv_inputs),
    'bidirectional_causal_conv1d': (bidirectional_causal_conv1d, lambda value: conv_inputs(value, 2)),
    'selective_scan': (lambda **x: selective_scan(**x, dt_softplus=True), scan_inputs),
    'selective_scan_fn': (scan_fn, lambda value: scan_inputs(value, channels_first=True)),
    'bidirectional_selective_scan': (
        lambda **x: bidirectional_selective_scan(**x, dt_softplus=True, scale=0.5),
        lambda value: scan_inputs(value, 2),
    ),
    'mamba_inner-gate': (inner, lambda value: inner_inputs(value, True, 1)),
    'mamba_inner-gate-both': (inner, lambda value: inner_inputs(value, True, 2)),
    'mamba_inner-input': (inner, lambda value: inner_inputs(value, False, 1)),
    'mamba_inner-input-both': (inner, lambda value: inner_inputs(value, False, 2)),
}


def results(op, inputs, dtype, backend):
    """The output without gradients, the output with them, and every gradient, by name."""
    leaves = {name: x.to(dtype).requires_grad_() for name, x in inputs.items()}
    with torch.no_grad():
        found = {'inference': op(**leaves, backend=backend)}
    y = found['training'] = op(**leaves, backend=backend)
    grads = torch.autograd.grad(y, list(leaves.values()), draw(*y.shape).to(dtype))
    return found | dict(zip(leaves, grads, strict=True))


def compare(got, exact):
    """A tensor's error may be 2e-5 of its largest value; only what float32 cannot hold may be infinite."""
    for name, want in exact.items():
        fits = want.float().isfinite()
        assert torch.equal(got[name].isfinite(), fits) and not got[name].isnan().any(), name
        error = torch.where(fits, got[name].double() - want, 0.0).abs().max()
        assert error <= 2e-5 * torch.where(fits, want, 0.0).abs().max() + 1e-30, (name, error)


@pytest.mark.parametrize('backend', BACKENDS)
@pytest.mark.parametrize('value', VALUES, ids=str)
@pytest.mark.parametrize('name', OPS)
def test_extreme_inputs_and_gates(name, value, backend):
    op, make = OPS[name]
    inputs = make(value)
    compare(results(op, inputs, torch.float32, backend), results(op, inputs, torch.float64, 'torch'))


@pytest.mark.parametrize('backend', BACKENDS)
@pytest.mark.parametrize('value', VALUES, ids=str)
def test_one_extreme_value_alone(value, backend):
    """Element by element: a large neighbour cannot hide a wrong small result."""
    x = torch.full((1, 40, 33), value, requires_grad=True)
    weight = torch.tensor([0.0, 0.0, 0.0, 1.0]).expand(33, 4)
    y = causal_conv1d(x, weight, backend=backend)
    (dx,) = torch.autograd.grad(y.sum(), x)
    exact = torch.full((1,), value, dtype=torch.float64, requires_grad=True)
    want = F.silu(exact)
    (slope,) = torch.autograd.grad(want, exact)
    torch.testing.assert_close(y.double(), want.expand(y.shape), rtol=1e-5, atol=3e-37)
    torch.testing.assert_close(dx.double(), slope.expand(y.shape), rtol=1e-5, atol=3e-37)
    if value < -89:
        assert torch.equal(y, F.silu(x)) and y.signbit().all()  # -0.0


@pytest.mark.parametrize('backend', BACKENDS)
@pytest.mark.parametrize('value', [-89.0, 1e4, -1e4], ids=str)
def test_norm(value, backend):
    inputs = {'x': scattered(value, B, D), 'residual': draw(B, D), 'weight': draw(D)}
    op = lambda **x: add_rms_norm(**x)[0]  # noqa: E731
    compare(results(op, inputs, torch.float32, backend), results(op, inputs, torch.float64, 'torch'))


@pytest.mark.parametrize('backend', BACKENDS)
def test_norm_of_rows_whose_squares_overflow(backend):
    """Zero, as PyTorch's norm in float32."""
    x, weight = torch.full((2, D), 1e30), draw(D)
    out, stream = add_rms_norm(x, None, weight, backend=backend)
    assert torch.equal(out, F.rms_norm(x, (D,), weight)) and torch.equal(stream, x)


@pytest.mark.parametrize('backend', BACKENDS)
@pytest.mark.parametrize('constant', [False, True], ids=['per-token', 'constant'])
@pytest.mark.parametrize('softplus', [False, True], ids=['plain', 'softplus'])
def test_a_state_that_decays_to_nothing_is_gone_however_large_it_was(softplus, constant, backend):
    """The smallest normal number in place of exp(-200) left 1e-4 of 1e34 in the state."""
    shape = (D, N) if constant else (1, 5, N)
    u, dt, A, b, c = draw(1, 5, D), draw(1, 5, D), -draw(D, N), draw(*shape), draw(*shape)
    u[:, 1], u[:, 2], dt[:, 2] = 1e34, 0.0, 400.0
    found = {}
    for dtype, name in ((torch.float32, backend), (torch.float64, 'torch')):
        inputs = [x.to(dtype) for x in (u, dt, A, b, c)]
        found[dtype] = selective_scan(*inputs, dt_softplus=softplus, return_last_state=True, backend=name)
    (y, state), (exact, last) = found[torch.float32], found[torch.float64]
    torch.testing.assert_close(y[:, 2:].double(), exact[:, 2:], rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(state.double(), last, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize('backend', BACKENDS)
def test_a_step_that_softplus_makes_zero_adds_nothing(backend):
    """softplus(-1e4) is 0: 1e-38 in its place, times 1e30 twice, overflowed."""
    one = torch.ones(1, 3, D)
    big = torch.full((1, 3, N), 1e30)
    y = selective_scan(1e30 * one, -1e4 * one, -torch.ones(D, N), big, big, dt_softplus=True, backend=backend)
    assert (y == 0).all()


@pytest.mark.parametrize('backend', BACKENDS)
def test_the_gradient_before_the_first_step_may_overflow(backend):
    """It meets the state of 0 there; infinity times 0 made the gradients of A and dt NaN."""
    A, dt = torch.full((D, N), 80.0, requires_grad=True), torch.ones(1, 1, D, requires_grad=True)
    y = selective_scan(torch.ones(1, 1, D), dt, A, torch.ones(1, 1, N), torch.full((1, 1, N), 1e6), backend=backend)
    for grad in torch.autograd.grad(y.sum(), (A, dt)):
        assert grad.isfinite().all()
