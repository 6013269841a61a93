"""The short convolutions: the reference against PyTorch's own, CPU backends against the reference, and bad input.

The Triton backend has a module of its own, test_causal_conv1d_triton.py.
"""

# K directions, B batch, L tokens, D channels, W width

import cases_causal_conv1d as cases
import pytest
import torch
import torch.nn.functional as F

from ssm_kernels import bidirectional_causal_conv1d, causal_conv1d, causal_conv1d_fn, same_conv1d
from ssm_kernels.ops import causal_conv1d as room

ON_CPU = [backend.name for backend in room.BACKENDS if backend.name != 'triton']
COMPILED = [name for name in ON_CPU if name != 'torch']
PADDINGS = ('causal', 'anticausal', 'both', 'same')


@pytest.fixture
def kernels(monkeypatch):
    """The module of the CPU operators, with poisoned memory."""
    pytest.importorskip('numba')
    from ssm_kernels.ops.causal_conv1d import cpu

    monkeypatch.setattr(cpu, 'empty', lambda *shape: torch.full(shape, float('nan'), dtype=torch.float32))
    return cpu


def tensors(dtype=torch.float32, seed=0, **sizes):
    case = cases.Case('free', **({'L': 21, 'D': 10} | sizes))
    return case, [None if x is None else x.to(dtype) for x in cases.make_inputs(case, seed).values()]


# ---- values ----


def by_pytorch(case, x, weight, bias):
    """F.conv1d on padded and flipped tokens, channels first."""
    weights, biases = (t if t is None or case.padding == 'both' else t[None] for t in (weight, bias))
    ys = []
    for k in range(len(weights)):
        flip = k == 1 or case.padding == 'anticausal'
        first = x.mT.flip(2) if flip else x.mT
        left = (case.W - 1) // 2 if case.padding == 'same' else case.W - 1
        padded = F.pad(first, (left, case.W - 1 - left))
        y = F.conv1d(padded, weights[k][:, None], None if biases is None else biases[k], groups=case.D)
        y = F.silu(y) if case.silu else y
        ys.append((y.flip(2) if flip else y).mT)
    return torch.stack(ys) if case.padding == 'both' else ys[0]


@pytest.mark.parametrize('case', cases.CASES, ids=str)
def test_reference_equals_pytorchs_convolution(case):
    inputs = cases.make_inputs(case).values()
    torch.testing.assert_close(cases.call(case, *inputs, 'torch'), by_pytorch(case, *inputs), rtol=1e-12, atol=1e-12)


def test_reference_follows_the_formula():
    _, (x, weight, bias) = tensors(torch.float64, L=6, D=2, W=3, batch=1, padding='causal')
    for y, tap in (
        (causal_conv1d(x, weight, bias, activation=None), lambda i, j: i - 2 + j),
        (causal_conv1d(x, weight, bias, activation=None, reverse=True), lambda i, j: i + 2 - j),
        (same_conv1d(x, weight, bias, activation=None), lambda i, j: i - 1 + j),
    ):
        for d in range(2):
            for i in range(6):
                taps = ((weight[d, j] * x[0, tap(i, j), d]).item() for j in range(3) if 0 <= tap(i, j) < 6)
                assert y[0, i, d].item() == pytest.approx(bias[d].item() + sum(taps), abs=1e-12)


@pytest.mark.parametrize('padding', PADDINGS)
@pytest.mark.parametrize('form', [{}, {'bias': False, 'W': 3}, {'silu': False, 'W': 2}], ids=str)
def test_first_and_second_derivatives_of_the_reference(padding, form):
    case, inputs = tensors(torch.float64, L=5, D=2, batch=1, padding=padding, **form)
    leaves = [x.requires_grad_() for x in inputs if x is not None]

    def call(x, weight, bias=None):
        return cases.call(case, x, weight, bias, 'torch')

    assert torch.autograd.gradcheck(call, leaves)
    assert torch.autograd.gradgradcheck(call, leaves)


@pytest.mark.parametrize('backend', COMPILED)
@pytest.mark.parametrize('case', cases.CASES, ids=str)
def test_float32_outputs_and_gradients(case, backend, kernels):
    assert cases.problems(case, backend) == []


LOW_PRECISION = ('49-tokens-both-view', '197-tokens-same-W3-view', 'one-past-two-chunks-causal-W3-view')


@pytest.mark.parametrize('backend', COMPILED)
@pytest.mark.parametrize('dtype', [torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize('case', [case for case in cases.CASES if case.label in LOW_PRECISION], ids=str)
def test_low_precision_outputs_and_gradients(case, dtype, backend, kernels):
    assert cases.problems(case, backend, dtype) == []


def test_case_list_covers_what_it_promises():
    chosen = cases.CASES
    assert {case.L for case in chosen} >= {1, 2, 3, 49, 197}
    assert {(case.padding, case.W) for case in chosen} >= {(p, w) for p in PADDINGS for w in (2, 3, 4)}
    for option in ('bias', 'silu', 'view'):
        found = {(case.padding, getattr(case, option)) for case in chosen}
        assert found == {(padding, on) for padding in PADDINGS for on in (False, True)}, option
    assert len({case.label for case in chosen}) == len(chosen)


@pytest.mark.parametrize('backend', ON_CPU)
@pytest.mark.parametrize('W', [2, 3, 4])
def test_directions_equal_flips(backend, W):
    _, (x, weight, bias) = tensors(W=W)
    both = bidirectional_causal_conv1d(x, weight, bias, backend=backend)
    ahead = causal_conv1d(x, weight[0], bias[0], backend=backend)
    back = causal_conv1d(x, weight[1], bias[1], reverse=True, backend=backend)
    flipped = causal_conv1d(x.flip(1), weight[1], bias[1], backend=backend).flip(1)
    assert torch.equal(both[0], ahead) and torch.equal(both[1], back)
    torch.testing.assert_close(back, flipped, rtol=1e-6, atol=1e-6)


def test_channels_first_function():
    _, (x, weight, bias) = tensors(padding='causal')
    first = x.mT.contiguous()
    plain = causal_conv1d(x, weight, bias, activation=None)
    assert torch.equal(causal_conv1d_fn(first, weight, bias), plain.mT)
    assert torch.equal(causal_conv1d_fn(first, weight), causal_conv1d(x, weight, activation=None).mT)
    for name in ('silu', 'swish'):
        y = causal_conv1d_fn(first, weight, bias, name)
        assert y.is_contiguous() and torch.equal(y, causal_conv1d(x, weight, bias).mT)


# ---- memory, autograd, operators ----


@pytest.mark.parametrize('backend', ON_CPU)
def test_non_contiguous_and_expanded_inputs(backend):
    _, (x, weight, bias) = tensors()
    bias = bias[:, :1].expand_as(bias)
    want = bidirectional_causal_conv1d(x, weight, bias.clone(), backend=backend)
    odd = [t.transpose(0, -1).contiguous().transpose(0, -1) for t in (x, weight)]
    assert not any(t.is_contiguous() for t in odd)
    assert torch.equal(bidirectional_causal_conv1d(*odd, bias, backend=backend), want)
    halves = torch.cat([x, x], -1).chunk(2, -1)
    assert torch.equal(bidirectional_causal_conv1d(halves[1], weight, bias, backend=backend), want)
    one = x[:1, :1].expand_as(x)
    assert torch.equal(
        bidirectional_causal_conv1d(one, weight, bias, backend=backend),
        bidirectional_causal_conv1d(one.clone(), weight, bias, backend=backend),
    )


@pytest.mark.parametrize('backend', ON_CPU)
@pytest.mark.parametrize('padding', PADDINGS)
def test_two_runs_and_two_backwards_give_the_same_bits(backend, padding):
    case, inputs = tensors(L=130, D=70, padding=padding)
    leaves, results = [x.requires_grad_() for x in inputs], []
    for _ in range(2):
        y = cases.call(case, *leaves, backend)
        for _ in range(2):
            results.append((y, *torch.autograd.grad(y, leaves, torch.ones_like(y), retain_graph=True)))
    for other in results[1:]:
        assert all(map(torch.equal, results[0], other))


@pytest.mark.parametrize('backend', ON_CPU)
def test_gradients_only_where_asked(backend):
    _, inputs = tensors()
    everything = [x.clone().requires_grad_() for x in inputs]
    want = torch.autograd.grad(bidirectional_causal_conv1d(*everything, backend=backend).sum(), everything)
    for i in range(3):
        alone = [x.clone().requires_grad_(i == k) for k, x in enumerate(inputs)]
        y = bidirectional_causal_conv1d(*alone, backend=backend)
        assert torch.equal(torch.autograd.grad(y.sum(), alone[i])[0], want[i])


@pytest.mark.parametrize('padding', PADDINGS)
@pytest.mark.parametrize('bias', [True, False])
def test_opcheck(padding, bias):
    pytest.importorskip('numba')
    from ssm_kernels.ops.causal_conv1d import cpu

    case, (x, weight, bias) = tensors(L=3, D=5, padding=padding, bias=bias)
    if padding != 'both':
        weight, bias = weight[None], None if bias is None else bias[None]
    leaves = [None if t is None else t.clone().requires_grad_() for t in (x, weight, bias)]
    torch.library.opcheck(cpu.forward_op, (*leaves, padding, True))
    y = cpu.forward_op(x, weight, bias, padding, True)
    torch.library.opcheck(cpu.backward_op, (y, x, weight, bias, padding, True))


@pytest.mark.parametrize('backend', COMPILED)
def test_second_derivative_says_no(backend):
    _, inputs = tensors()
    leaves = [x.requires_grad_() for x in inputs]
    y = bidirectional_causal_conv1d(*leaves, backend=backend)
    (dx,) = torch.autograd.grad(y.square().sum(), leaves[:1], create_graph=True)
    with pytest.raises(RuntimeError, match=f'backend {backend!r} has no second derivative'):
        dx.sum().backward()


@pytest.mark.parametrize('backend', ON_CPU)
def test_torch_compile_without_graph_breaks(backend):
    _, inputs = tensors()
    leaves = [x.requires_grad_() for x in inputs]

    def call(x, weight, bias):
        both = bidirectional_causal_conv1d(x, weight, bias, backend=backend)
        return both.sum(0) + same_conv1d(x, weight[0], bias[0], activation=None, backend=backend)

    want, got = call(*leaves), torch.compile(call, fullgraph=True, backend='aot_eager')(*leaves)
    assert torch.equal(got, want)
    grads = [torch.autograd.grad(y.square().sum(), leaves) for y in (want, got)]
    for a, b in zip(*grads, strict=True):
        torch.testing.assert_close(a, b)


def test_gradient_checkpointing():
    _, inputs = tensors()
    leaves = [x.requires_grad_() for x in inputs]
    want = torch.autograd.grad(bidirectional_causal_conv1d(*leaves).sum(), leaves)
    y = torch.utils.checkpoint.checkpoint(bidirectional_causal_conv1d, *leaves, use_reentrant=False)
    assert all(map(torch.equal, torch.autograd.grad(y.sum(), leaves), want))


@pytest.mark.parametrize('backend', ON_CPU)
def test_autocast_narrows_activations_and_keeps_parameters(backend):
    _, (x, weight, bias) = tensors()
    weight, bias = weight + 1e-4, bias + 1e-4  # no longer exact in bfloat16
    want = bidirectional_causal_conv1d(x.bfloat16(), weight, bias, backend=backend)
    with torch.autocast('cpu', dtype=torch.bfloat16):
        got = bidirectional_causal_conv1d(x, weight, bias, backend=backend)
        half = bidirectional_causal_conv1d(x.half(), weight.bfloat16(), bias, backend=backend)
        wide = bidirectional_causal_conv1d(x.double(), weight.double(), bias.double(), backend='torch')
    assert got.dtype == half.dtype == torch.bfloat16 and wide.dtype == torch.float64
    assert torch.equal(got, want)


# ---- dispatch ----


def test_dispatch_prefers_a_kernel_on_the_cpu_and_torch_in_float64(monkeypatch):
    from ssm_kernels.dispatch import Backend

    ran = []

    def spy(backend):
        load = backend.load
        return Backend(backend.name, backend.why_not, lambda: (ran.append(backend.name), load())[1])

    monkeypatch.setattr(room, 'BACKENDS', tuple(map(spy, room.BACKENDS)))
    for dtype in (torch.float32, torch.bfloat16, torch.float64):
        bidirectional_causal_conv1d(*tensors(dtype)[1])
    bidirectional_causal_conv1d(*tensors()[1], backend='torch')
    assert ran == [ON_CPU[0], ON_CPU[0], 'torch', 'torch']


def test_a_forced_backend_never_falls_back():
    _, inputs = tensors()
    with pytest.raises(RuntimeError, match="backend 'triton' cannot run this: tensors are on cpu"):
        bidirectional_causal_conv1d(*inputs, backend='triton')
    with pytest.raises(ValueError, match="unknown backend 'cuda'.*'triton'.*'torch'"):
        bidirectional_causal_conv1d(*inputs, backend='cuda')
    for backend in COMPILED:
        with pytest.raises(RuntimeError, match=f'backend {backend!r} cannot run this: .*float64'):
            bidirectional_causal_conv1d(*(x.double() for x in inputs), backend=backend)


def test_meta_tensors_go_to_the_reference():
    y = bidirectional_causal_conv1d(*(x.to('meta') for x in tensors()[1]))
    assert y.is_meta and y.shape == (2, 2, 21, 10)


# ---- bad input ----

SHAPES = {'x': (2, 7, 6), 'weight': (6, 4), 'bias': (6,)}
BAD = {
    'x-rank': ({'x': (7, 6)}, r'x has shape \(7, 6\), must be \(B, L, D\)'),
    'x-empty-batch': ({'x': (0, 7, 6)}, r'x has shape \(0, 7, 6\); every size must be at least 1'),
    'x-no-tokens': ({'x': (2, 0, 6)}, r'x has shape \(2, 0, 6\); every size must be at least 1'),
    'weight-channels': (
        {'weight': (5, 4)},
        r'weight has shape \(5, 4\), must be \(6, W\) for x of shape \(2, 7, 6\)',
    ),
    'weight-rank': ({'weight': (6, 1, 4)}, r'weight has shape \(6, 1, 4\), must be \(6, W\)'),
    'width-1': ({'weight': (6, 1)}, r'weight has shape \(6, 1\): width 1, legal are 2 to 4'),
    'width-5': ({'weight': (6, 5)}, r'weight has shape \(6, 5\): width 5, legal are 2 to 4'),
    'bias-shape': ({'bias': (7,)}, r'bias has shape \(7,\), must be \(6,\) for x of shape \(2, 7, 6\)'),
}


@pytest.mark.parametrize('op', [causal_conv1d, same_conv1d])
@pytest.mark.parametrize('change, message', BAD.values(), ids=BAD)
def test_bad_shapes(change, message, op):
    with pytest.raises(ValueError, match=f'{op.__name__}: {message}'):
        op(**{name: torch.ones(shape) for name, shape in (SHAPES | change).items()})


def test_bad_shapes_of_the_bidirectional_and_the_drop_in_function():
    x, weight, bias = (torch.ones(shape) for shape in SHAPES.values())
    with pytest.raises(ValueError, match=r'weight has shape \(6, 4\), must be \(2, 6, W\) for x of shape \(2, 7, 6\)'):
        bidirectional_causal_conv1d(x, weight, bias)
    with pytest.raises(ValueError, match=r'bias has shape \(6,\), must be \(2, 6\) for x of shape \(2, 7, 6\)'):
        bidirectional_causal_conv1d(x, weight.expand(2, 6, 4), bias)
    with pytest.raises(ValueError, match=r'causal_conv1d_fn: weight has shape \(6, 4\), must be \(7, W\)'):
        causal_conv1d_fn(x, weight, bias)
    with pytest.raises(ValueError, match=r'causal_conv1d_fn: x has shape \(7, 6\), must be \(B, D, L\)'):
        causal_conv1d_fn(x[0], weight, bias)


@pytest.mark.parametrize(
    'name, value, message',
    [
        ('x', torch.ones(2, 7, 6, dtype=torch.int64), 'x has dtype torch.int64; legal are torch.float32'),
        ('weight', torch.ones(6, 4, dtype=torch.complex64), 'weight has dtype torch.complex64; legal are'),
        ('weight', torch.ones(6, 4, dtype=torch.float16), 'weight has dtype torch.float16, x has torch.float32'),
        ('bias', torch.ones(6, dtype=torch.float64), 'bias has dtype torch.float64, x has torch.float32'),
        ('x', torch.ones(2, 7, 6, dtype=torch.float64), 'weight has dtype torch.float32, x has torch.float64'),
        ('weight', torch.ones(6, 4, device='meta'), 'weight is on meta, x is on cpu'),
        ('weight', [[1.0]], 'weight must be a tensor, got list'),
        ('x', None, 'x must be a tensor, got NoneType'),
    ],
)
def test_bad_types(name, value, message):
    x = {key: torch.ones(shape) for key, shape in SHAPES.items()} | {name: value}
    with pytest.raises(ValueError, match=f'causal_conv1d: {message}'):
        causal_conv1d(**x)


def test_bad_activation():
    x, weight, bias = (torch.ones(shape) for shape in SHAPES.values())
    for call in (causal_conv1d, same_conv1d):
        with pytest.raises(ValueError, match=f"{call.__name__}: activation must be 'silu' or None, got 'relu'"):
            call(x, weight, bias, activation='relu')
    with pytest.raises(ValueError, match="causal_conv1d_fn: activation must be .*'relu'"):
        causal_conv1d_fn(x.mT, weight, bias, 'relu')
