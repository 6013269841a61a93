"""Every argument of every public op: what is legal runs in every promised mix of dtypes, what is not is named."""

# K directions (1 or 2), B batch, L tokens, D channels, N state size, R rank of dt, W width

import importlib.util
import inspect
import itertools
import re

import numpy as np
import pytest
import torch

import ssm_kernels
from ssm_kernels import DirectionWeights, mamba_inner

NO_NUMBA = importlib.util.find_spec('numba') is None
BACKENDS = ['torch', pytest.param('numba', marks=pytest.mark.skipif(NO_NUMBA, reason='needs numba'))]
B, L, D, N, R, W = 2, 7, 6, 3, 2, 4


def draw(*shape, seed=0, factor=0.5):
    """Values that bfloat16 and float16 hold exactly."""
    x = torch.randn(*shape, generator=torch.Generator().manual_seed(seed)) * factor
    return x.bfloat16().half().float()


def scan(lead=()):
    return {
        'u': draw(*lead, B, L, D), 'dt': draw(*lead, B, L, D, seed=1), 'A': -draw(*lead, D, N, seed=2).abs() - 0.125,
        'B': draw(*lead, B, L, N, seed=3), 'C': draw(*lead, B, L, N, seed=4), 'D': draw(*lead, D, seed=5),
        'z': draw(B, L, D, seed=6), 'dt_bias': draw(*lead, D, seed=7), 'dt_softplus': True,
    }  # fmt: skip


def scan_first():
    x = scan()
    x |= {name: x[name].mT.contiguous() for name in ('u', 'dt', 'B', 'C', 'z')}
    renamed = {'dt': 'delta', 'dt_bias': 'delta_bias', 'dt_softplus': 'delta_softplus'}
    return {renamed.get(name, name): value for name, value in x.items()}


def constant(x):
    lead = x['A'].shape[:-2]
    return x | {'B': draw(*lead, D, N, seed=3), 'C': draw(*lead, D, N, seed=4)}


def conv(lead=()):
    return {'x': draw(B, L, D), 'weight': draw(*lead, D, W, seed=1), 'bias': draw(*lead, D, seed=2)}


def direction(seed=0, **changes):
    shapes = DirectionWeights((D, W), (D,), (R + 2 * N, D), (D, R), (D, N), (D,), (D,))
    w = DirectionWeights(*(draw(*shape, seed=seed + i) for i, shape in enumerate(shapes)))
    return w._replace(A=-w.A.abs() - 0.125)._replace(**changes)


def inner(K):
    return {'x': draw(B, L, D), 'z': draw(B, L, D, seed=1), 'weights': [direction(10 * k + 2) for k in range(K)]}


CALLS = {
    'causal_conv1d': conv,
    'same_conv1d': conv,
    'causal_conv1d_fn': lambda: conv() | {'x': draw(B, D, L), 'activation': 'silu'},
    'bidirectional_causal_conv1d': lambda: conv((2,)),
    'selective_scan': scan,
    'selective_scan_fn': scan_first,
    'bidirectional_selective_scan': lambda: scan((2,)),
    'mamba_inner': lambda: inner(2),
    'add_rms_norm': lambda: {'x': draw(B, L, D), 'residual': draw(B, L, D, seed=1), 'weight': draw(D, seed=2)},
}
MIXED = CALLS | {
    'selective_scan, constant': lambda: constant(scan()),
    'bidirectional_selective_scan, constant': lambda: constant(scan((2,))),
    'mamba_inner, one direction': lambda: inner(1),
    'mamba_inner, same padding': lambda: inner(1) | {'padding': 'same'},
}


def test_every_public_op_is_here():
    assert set(CALLS) == set(ssm_kernels.__all__) - {'DirectionWeights', 'load_backends'}


# ---- mixes of dtypes ----

FREE = ('weight', 'bias', 'A', 'D', 'dt_bias', 'delta_bias')  # float32 or dtype of the activations
MIXES = {
    'float32 weights': lambda i: True,
    'weights as x': lambda i: False,
    'every other weight float32': lambda i: i % 2 == 0,
    'the other weights float32': lambda i: i % 2 == 1,
}


def cast(name, arguments, dtype, wide):
    """Arguments with activations in dtype; of the free ones the i-th is float32 where wide(i). Also all tensors."""
    count, leaves, found = itertools.count(), [], {}
    full = torch.float64 if dtype == torch.float64 else torch.float32

    def one(x, free):
        if x is None:
            return None
        leaves.append(x.to(full if free and wide(next(count)) else dtype).clone().requires_grad_())
        return leaves[-1]

    for key, value in arguments.items():
        if key == 'weights':
            found[key] = [DirectionWeights(*(one(t, True) for t in w)) for w in value]
        elif not isinstance(value, torch.Tensor):
            found[key] = value
        elif key == 'residual':
            leaves.append(value.to(full).clone().requires_grad_())
            found[key] = leaves[-1]
        else:
            found[key] = one(value, key in FREE or (key in 'BC' and 'constant' in name))
    return found, leaves


def results(name, dtype, wide, backend):
    op = getattr(ssm_kernels, name.split(',')[0])
    options = {'backend': backend} if backend and not name.endswith('_fn') else {}
    arguments, leaves = cast(name, MIXED[name](), dtype, wide)
    with torch.no_grad():
        inference = op(**arguments, **options)
    training = op(**arguments, **options)
    inference, training = (y[0] if isinstance(y, tuple) else y for y in (inference, training))
    seed = draw(*training.shape, seed=20).to(training.dtype)
    return [inference, training, *torch.autograd.grad(training, leaves, seed)], leaves


def error(got, exact):
    return ((got.double() - exact).abs().max() / exact.abs().max()).item()


@pytest.mark.parametrize('backend', BACKENDS)
@pytest.mark.parametrize('dtype', [torch.float32, torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize('mix', MIXES)
@pytest.mark.parametrize('name', MIXED)
def test_promised_mixes_of_dtypes(name, mix, dtype, backend):
    """The error against float64 is at most twice that of plain PyTorch with all weights in the dtype of x."""
    exact, _ = results(name, torch.float64, MIXES[mix], 'torch')
    plain, _ = results(name, dtype, MIXES['weights as x'], 'torch')
    got, leaves = results(name, dtype, MIXES[mix], backend)
    assert got[0].dtype == got[1].dtype == dtype
    assert [g.dtype for g in got[2:]] == [leaf.dtype for leaf in leaves]
    for i, (ours, theirs, want) in enumerate(zip(got, plain, exact, strict=True)):
        most = max(2 * error(theirs, want), torch.finfo(dtype).eps, 1e-6)
        assert error(ours, want) <= most, i


@pytest.mark.parametrize('backend', BACKENDS)
@pytest.mark.parametrize('directions', [1, 2])
@pytest.mark.parametrize('low, other', [(torch.bfloat16, torch.float16), (torch.float16, torch.bfloat16)], ids=str)
def test_weights_of_the_other_half_precision_under_autocast(low, other, directions, backend):
    x = inner(directions)
    halves, same = (
        [DirectionWeights(*(None if t is None else t.to(other).to(dtype) for t in w)) for w in x['weights']]
        for dtype in (other, torch.float32)
    )
    exact = mamba_inner(**(x | {'weights': same}))
    with torch.autocast('cpu', dtype=low):
        with torch.no_grad():
            inference = mamba_inner(**(x | {'weights': halves}), backend=backend)
        leaf = x['x'].requires_grad_()
        training = mamba_inner(**(x | {'weights': halves}), backend=backend)
    assert inference.dtype == training.dtype == low
    for got in (inference, training):
        assert error(got, exact.double()) <= 8 * torch.finfo(torch.bfloat16).eps
    assert torch.autograd.grad(training.float().sum(), leaf)[0].isfinite().all()


@pytest.mark.parametrize('name', ['conv_bias', 'D', 'dt_bias'])
@pytest.mark.parametrize('k', [0, 1])
@pytest.mark.parametrize('backend', BACKENDS)
def test_a_weight_that_one_direction_has(name, k, backend):
    x = inner(2)
    x['weights'][k] = x['weights'][k]._replace(**{name: None})
    zero = [w._replace(**{name: torch.zeros(D)}) if getattr(w, name) is None else w for w in x['weights']]
    with torch.no_grad():
        torch.testing.assert_close(
            mamba_inner(**x, backend=backend), mamba_inner(**(x | {'weights': zero}), backend='torch')
        )
    leaf = x['x'].requires_grad_()
    grads = [
        torch.autograd.grad(mamba_inner(**(x | {'weights': w}), backend=backend).sum(), leaf)[0]
        for w in (x['weights'], zero)
    ]
    torch.testing.assert_close(*grads)


# ---- bad arguments ----

NESTED = torch.nested.nested_tensor([torch.ones(2, 3), torch.ones(4, 3)])
JAGGED = torch.nested.nested_tensor([torch.ones(2, 3), torch.ones(4, 3)], layout=torch.jagged)
NO_TENSORS = [3, 1.5, True, 'x', [1.0], (), {}, np.ones(3, np.float32), NESTED, JAGGED]
FLAGS = ['yes', 1, 0, None, [], torch.tensor(True), np.bool_(True)]
NUMBERS = ['x', None, True, [1.0], 1j, float('nan'), float('inf'), float('-inf'), torch.tensor(1.0)]
NAMES = ['nonsense', 3, True, [], ['silu'], {}, torch.ones(2), np.array(['silu', 'same'])]
OPTIONAL = ('bias', 'D', 'z', 'dt_bias', 'delta_bias', 'residual')
BAD = {
    **dict.fromkeys(('reverse', 'dt_softplus', 'delta_softplus', 'return_last_state'), FLAGS),
    'scale': NUMBERS,
    'eps': [*NUMBERS, -1e-5, 10**400],
    'activation': NAMES,
    'padding': [*NAMES, None],
    'backend': NAMES,
}


def bad_tensors(x, optional):
    """Everything that a tensor argument like x must not be."""
    wrong = [x.to_sparse(), x.to('meta'), x.long(), x.bool(), x.to(torch.complex64), x.double()]
    wrong += [torch.tensor(1.0), x[:0], x.unsqueeze(0).unsqueeze(0).unsqueeze(0), torch.ones(*(n + 5 for n in x.shape))]
    if x.dim() == 2:
        wrong.append(x.to_sparse_csr())
    return [*NO_TENSORS, *wrong] + ([] if optional else [None])


def bad_weights():
    good = direction()
    yield from (None, 3, 'ab', [], (), {}, good, torch.ones(3), [good] * 3, [good, None], [good, 3], [good[:6], good])
    yield ['abcdefg', good]
    for k in (0, 1):
        for name, x in good._asdict().items():
            for wrong in bad_tensors(x, name in ('conv_bias', 'D', 'dt_bias')):
                yield [direction(), direction()][: 1 - k] + [direction(**{name: wrong})] + [direction()] * k


def parameters():
    for name in CALLS:
        for parameter in inspect.signature(getattr(ssm_kernels, name)).parameters:
            yield pytest.param(name, parameter, id=f'{name}-{parameter}')


@pytest.mark.parametrize(('name', 'parameter'), list(parameters()))
def test_bad_arguments_are_named(name, parameter):
    good = CALLS[name]()
    if name == 'mamba_inner' and parameter in ('reverse', 'padding'):
        good['weights'] = good['weights'][:1]
    op = getattr(ssm_kernels, name)
    op(**good)
    if parameter == 'weights':
        values = bad_weights()
    elif isinstance(good.get(parameter), torch.Tensor):
        values = bad_tensors(good[parameter], parameter in OPTIONAL)
    else:
        values = BAD[parameter]
    for value in values:  # a first tensor of another device, dtype or size shows at the next, which names both
        with pytest.raises((ValueError, TypeError)) as caught:
            op(**(good | {parameter: value}))
        message = str(caught.value)
        assert message.startswith(f'{name}: ') and '\n' not in message, (value, message)
        assert re.search(rf'\b{parameter}\b', message), (value, message)
