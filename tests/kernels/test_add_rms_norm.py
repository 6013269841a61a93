"""Residual addition with RMSNorm: the reference against PyTorch's own, CPU backends against it, and bad input.

The Triton backend has a module of its own, test_add_rms_norm_triton.py.
"""

# T tokens, D channels

import cases_add_rms_norm as cases
import pytest
import torch
import torch.nn.functional as F

from ssm_kernels import add_rms_norm
from ssm_kernels.ops import add_rms_norm as room

ON_CPU = [backend.name for backend in room.BACKENDS if backend.name != 'triton']
COMPILED = [name for name in ON_CPU if name != 'torch']


@pytest.fixture
def kernels(monkeypatch):
    """The module of the CPU operators, with poisoned memory."""
    pytest.importorskip('numba')
    from ssm_kernels.ops.add_rms_norm import cpu

    monkeypatch.setattr(cpu, 'empty', lambda *shape: torch.full(shape, float('nan'), dtype=torch.float32))
    return cpu


def tensors(dtype=torch.float32, seed=0, **sizes):
    """x, residual, weight; x in dtype, the others in float32, or all in float64."""
    case = cases.Case('free', **({'tokens': (2, 9), 'D': 20} | sizes))
    wide = torch.float64 if dtype == torch.float64 else torch.float32
    inputs = cases.make_inputs(case, seed)
    return [None if x is None else x.to(dtype if name == 'x' else wide) for name, x in inputs.items()]


# ---- values ----


@pytest.mark.parametrize('case', cases.CASES, ids=str)
def test_reference_equals_pytorchs_norm(case):
    x, residual, weight = cases.make_inputs(case).values()
    out, stream = add_rms_norm(x, residual, weight, eps=case.eps)
    want = x if residual is None else x + residual
    torch.testing.assert_close(stream, want, rtol=0, atol=0)
    torch.testing.assert_close(out, F.rms_norm(want, (case.D,), weight, case.eps), rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize('added', [True, False])
def test_first_and_second_derivatives_of_the_reference(added):
    leaves = [x.requires_grad_() for x in tensors(torch.float64, tokens=(3,), D=4, added=added) if x is not None]

    def call(x, *rest):
        residual, weight = rest if added else (None, *rest)
        return add_rms_norm(x, residual, weight, eps=0.1, backend='torch')

    assert torch.autograd.gradcheck(call, leaves)
    assert torch.autograd.gradgradcheck(call, leaves)


@pytest.mark.parametrize('backend', COMPILED)
@pytest.mark.parametrize('case', cases.CASES, ids=str)
def test_float32_outputs_and_gradients(case, backend, kernels):
    assert cases.problems(case, backend) == []


LOW_PRECISION = ('49-tokens-start-D-past-a-tile', '197-tokens', 'out-alone', 'residual-alone', 'view')


@pytest.mark.parametrize('backend', COMPILED)
@pytest.mark.parametrize('dtype', [torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize('case', [case for case in cases.CASES if case.label in LOW_PRECISION], ids=str)
def test_low_precision_outputs_and_gradients(case, dtype, backend, kernels):
    assert cases.problems(case, backend, dtype) == []


def test_case_list_covers_what_it_promises():
    chosen = cases.CASES
    assert {case.added for case in chosen if case.view} == {False, True}
    assert {(case.added, case.ends) for case in chosen} >= {
        (added, ends) for added in (False, True) for ends in (('out',), ('residual',), ('out', 'residual'))
    }
    assert len({case.label for case in chosen}) == len(chosen)


@pytest.mark.parametrize('backend', ON_CPU)
@pytest.mark.parametrize('dtype', [torch.bfloat16, torch.float16], ids=str)
def test_the_stream_adds_up_in_float32(backend, dtype):
    x, residual, weight = tensors(dtype)
    residual = residual + 100.0
    small = x * 1e-3
    out, stream = add_rms_norm(small, residual, weight, backend=backend)
    assert out.dtype == dtype and stream.dtype == torch.float32
    assert torch.equal(stream, residual + small.float())
    start = add_rms_norm(x, None, weight, backend=backend)[1]
    assert start.dtype == torch.float32 and torch.equal(start, x.float())


@pytest.mark.parametrize('backend', ON_CPU)
def test_large_and_tiny_rows(backend):
    x, _, weight = tensors(tokens=(3,), D=50, added=False)
    x = x * torch.tensor([1e15, 1.0, 1e-15])[:, None]
    out, _ = add_rms_norm(x, None, weight, eps=1e-30, backend=backend)
    want = F.rms_norm(x.double(), (50,), weight.double(), 1e-30)
    torch.testing.assert_close(out.double(), want, rtol=1e-5, atol=1e-6)
    zero, _ = add_rms_norm(torch.zeros(2, 50), torch.zeros(2, 50), weight, backend=backend)
    assert torch.equal(zero, torch.zeros(2, 50))


# ---- memory, autograd, operators ----


@pytest.mark.parametrize('backend', ON_CPU)
def test_non_contiguous_and_expanded_inputs(backend):
    x, residual, weight = tensors(tokens=(3, 5))
    want = add_rms_norm(x, residual, weight, backend=backend)
    odd = [t.transpose(0, -1).contiguous().transpose(0, -1) for t in (x, residual)]
    twice = torch.stack([weight, weight], -1)[:, 0]
    assert not any(t.is_contiguous() for t in (*odd, twice))
    assert all(map(torch.equal, add_rms_norm(*odd, twice, backend=backend), want))
    swapped = [t.transpose(0, 1).contiguous().transpose(0, 1) for t in (x, residual)]
    assert all(map(torch.equal, add_rms_norm(*swapped, weight, backend=backend), want))
    row = x[:1, :1].expand_as(x)
    want = add_rms_norm(row.clone(), residual, weight[:1].repeat(20), backend=backend)
    assert all(map(torch.equal, add_rms_norm(row, residual, weight[:1].expand(20), backend=backend), want))


@pytest.mark.parametrize('backend', ON_CPU)
@pytest.mark.parametrize('added', [True, False])
def test_two_runs_and_two_backwards_give_the_same_bits(backend, added):
    inputs = tensors(tokens=(300,), D=70, added=added)
    leaves, results = [x.requires_grad_() for x in inputs if x is not None], []
    for _ in range(2):
        ends = add_rms_norm(*inputs, backend=backend)
        seeds = [torch.ones_like(x) for x in ends]
        for _ in range(2):
            results.append((*ends, *torch.autograd.grad(ends, leaves, seeds, retain_graph=True)))
    for other in results[1:]:
        assert all(map(torch.equal, results[0], other))


@pytest.mark.parametrize('backend', ON_CPU)
def test_gradients_only_where_asked(backend):
    inputs = tensors()
    everything = [x.clone().requires_grad_() for x in inputs]
    want = torch.autograd.grad(sum(y.square().sum() for y in add_rms_norm(*everything, backend=backend)), everything)
    for i in range(3):
        alone = [x.clone().requires_grad_(i == k) for k, x in enumerate(inputs)]
        y = sum(y.square().sum() for y in add_rms_norm(*alone, backend=backend))
        assert torch.equal(torch.autograd.grad(y, alone[i])[0], want[i])


@pytest.mark.parametrize('backend', ON_CPU)
@pytest.mark.parametrize('dtype', [torch.float32, torch.bfloat16], ids=str)
def test_a_chain_of_blocks(backend, dtype):
    """The stream of one call goes into the next, as in a backbone; its gradient comes from both of its users."""
    x, _, weight = tensors(torch.float64)
    grads = []
    for kind, name in ((torch.float64, 'torch'), (dtype, 'torch'), (dtype, backend)):
        wide = torch.float64 if kind == torch.float64 else torch.float32
        leaves = [x.to(kind).requires_grad_(), weight.to(wide).requires_grad_()]
        hidden, stream = leaves[0], None
        for _ in range(4):
            out, stream = add_rms_norm(hidden, stream, leaves[1], backend=name)
            hidden = out.tanh()
        loss = (hidden.to(wide) + stream).square().sum()
        grads.append(dict(zip(('x', 'weight'), torch.autograd.grad(loss, leaves), strict=True)))
    exact, plain, ours = grads
    assert cases.deviations(ours, plain, exact) == []


@pytest.mark.parametrize('added', [True, False])
@pytest.mark.parametrize('dtype', [torch.float32, torch.bfloat16], ids=str)
def test_opcheck(added, dtype):
    pytest.importorskip('numba')
    from ssm_kernels.ops.add_rms_norm import cpu

    args = tensors(dtype, tokens=(3,), D=5, added=added)
    leaves = [None if t is None else t.clone().requires_grad_() for t in args]
    torch.library.opcheck(cpu.forward_op, (*leaves, 1e-5, dtype))
    out, stream, rstd = cpu.forward_op(*args, 1e-5, dtype)
    for dstream in (stream, None):
        torch.library.opcheck(cpu.backward_op, (out, dstream, stream, args[2], rstd))


@pytest.mark.parametrize('backend', COMPILED)
def test_second_derivative_says_no(backend):
    leaves = [x.requires_grad_() for x in tensors()]
    out, _ = add_rms_norm(*leaves, backend=backend)
    (dx,) = torch.autograd.grad(out.square().sum(), leaves[:1], create_graph=True)
    with pytest.raises(RuntimeError, match=f'backend {backend!r} has no second derivative'):
        dx.sum().backward()


@pytest.mark.parametrize('backend', ON_CPU)
def test_torch_compile_without_graph_breaks(backend):
    leaves = [x.requires_grad_() for x in tensors()]

    def call(x, residual, weight):
        hidden, stream = add_rms_norm(x, None, weight, backend=backend)
        out, stream = add_rms_norm(hidden.tanh(), stream + residual, weight, backend=backend)
        return out + stream

    want, got = call(*leaves), torch.compile(call, fullgraph=True, backend='aot_eager')(*leaves)
    torch.testing.assert_close(got, want)
    grads = [torch.autograd.grad(y.square().sum(), leaves) for y in (want, got)]
    for a, b in zip(*grads, strict=True):
        torch.testing.assert_close(a, b)


def test_gradient_checkpointing():
    leaves = [x.requires_grad_() for x in tensors()]
    want = torch.autograd.grad(sum(y.sum() for y in add_rms_norm(*leaves)), leaves)
    y = torch.utils.checkpoint.checkpoint(add_rms_norm, *leaves, use_reentrant=False)
    assert all(map(torch.equal, torch.autograd.grad(sum(t.sum() for t in y), leaves), want))


@pytest.mark.parametrize('backend', ON_CPU)
def test_autocast_narrows_the_output_alone(backend):
    x, residual, weight = tensors()
    x, weight = x + 1e-4, weight + 1e-4  # no longer exact in bfloat16
    want, stream = add_rms_norm(x, residual, weight, backend=backend)
    with torch.autocast('cpu', dtype=torch.bfloat16):
        out, new = add_rms_norm(x, residual, weight, backend=backend)
        low = add_rms_norm(x.bfloat16(), residual, weight.bfloat16(), backend=backend)[0]
        half = add_rms_norm(x.half(), residual, weight, backend=backend)[0]
        wide = add_rms_norm(*(t.double() for t in (x, residual, weight)), backend='torch')
    assert torch.equal(out, want.bfloat16()) and torch.equal(new, stream)
    assert low.dtype == torch.bfloat16 and half.dtype == torch.float16
    assert all(t.dtype == torch.float64 for t in wide)


# ---- dispatch ----


def test_dispatch_prefers_a_kernel_on_the_cpu_and_torch_in_float64(monkeypatch):
    from ssm_kernels.dispatch import Backend

    ran = []

    def spy(backend):
        load = backend.load
        return Backend(backend.name, backend.why_not, lambda: (ran.append(backend.name), load())[1])

    monkeypatch.setattr(room, 'BACKENDS', tuple(map(spy, room.BACKENDS)))
    for dtype in (torch.float32, torch.bfloat16, torch.float64):
        add_rms_norm(*tensors(dtype))
    add_rms_norm(*tensors(), backend='torch')
    assert ran == [ON_CPU[0], ON_CPU[0], 'torch', 'torch']


def test_a_forced_backend_never_falls_back():
    with pytest.raises(RuntimeError, match="backend 'triton' cannot run this: tensors are on cpu"):
        add_rms_norm(*tensors(), backend='triton')
    with pytest.raises(ValueError, match="unknown backend 'cuda'.*'triton'.*'torch'"):
        add_rms_norm(*tensors(), backend='cuda')
    for backend in COMPILED:
        with pytest.raises(RuntimeError, match=f'backend {backend!r} cannot run this: .*float64'):
            add_rms_norm(*tensors(torch.float64), backend=backend)


def test_meta_tensors_go_to_the_reference():
    out, stream = add_rms_norm(*(x.to('meta') for x in tensors(torch.bfloat16)))
    assert out.is_meta and out.shape == stream.shape == (2, 9, 20)
    assert (out.dtype, stream.dtype) == (torch.bfloat16, torch.float32)


# ---- bad input ----

SHAPES = {'x': (2, 7, 6), 'residual': (2, 7, 6), 'weight': (6,)}
BAD = {
    'x-rank': ({'x': ()}, r'x has shape \(\), must be \(..., D\)'),
    'x-empty-batch': ({'x': (0, 7, 6)}, r'x has shape \(0, 7, 6\); every size must be at least 1'),
    'x-no-channels': ({'x': (2, 7, 0)}, r'x has shape \(2, 7, 0\); every size must be at least 1'),
    'residual-shape': (
        {'residual': (1, 7, 6)},
        r'residual has shape \(1, 7, 6\), must equal that of x, \(2, 7, 6\)',
    ),
    'weight-shape': ({'weight': (7,)}, r'weight has shape \(7,\), must be \(6,\) for x of shape \(2, 7, 6\)'),
    'weight-rank': ({'weight': (1, 6)}, r'weight has shape \(1, 6\), must be \(6,\)'),
}


@pytest.mark.parametrize('change, message', BAD.values(), ids=BAD)
def test_bad_shapes(change, message):
    with pytest.raises(ValueError, match=f'add_rms_norm: {message}'):
        add_rms_norm(**{name: torch.ones(shape) for name, shape in (SHAPES | change).items()})


@pytest.mark.parametrize(
    'name, value, message',
    [
        ('x', torch.ones(2, 7, 6, dtype=torch.int64), 'x has dtype torch.int64; legal are torch.float32'),
        ('residual', torch.ones(2, 7, 6, dtype=torch.int32), 'residual has dtype torch.int32; legal are'),
        ('residual', torch.ones(2, 7, 6, dtype=torch.bfloat16), 'residual has dtype torch.bfloat16, x has .*float32'),
        ('x', torch.ones(2, 7, 6, dtype=torch.float64), 'residual has dtype torch.float32, x has torch.float64'),
        ('weight', torch.ones(6, dtype=torch.float16), 'weight has dtype torch.float16, x has torch.float32'),
        ('weight', torch.ones(6, device='meta'), 'weight is on meta, x is on cpu'),
        ('weight', None, 'weight must be a tensor, got NoneType'),
        ('x', [1.0], 'x must be a tensor, got list'),
    ],
)
def test_bad_types(name, value, message):
    x = {key: torch.ones(shape) for key, shape in SHAPES.items()} | {name: value}
    with pytest.raises(ValueError, match=f'add_rms_norm: {message}'):
        add_rms_norm(**x)


@pytest.mark.parametrize('eps', [-1e-5, float('nan')])
def test_bad_epsilon(eps):
    with pytest.raises(ValueError, match='add_rms_norm: eps is .*, must be at least 0'):
        add_rms_norm(*tensors(), eps=eps)
