"""The selective scan: every backend against the float64 reference, outputs and gradients by name, and its bad input."""

# K directions, B batch, L tokens, D channels, N state size, G groups of channels

import gc
import os
import platform
import subprocess
import sys
import threading
from pathlib import Path

import cases
import pytest
import torch
import torch.nn.functional as F

from ssm_kernels import bidirectional_selective_scan, selective_scan, selective_scan_fn

pytest.importorskip('numba')
from ssm_kernels import cpu_threads, cpu_vectors  # noqa: E402
from ssm_kernels.ops.selective_scan import cpu, cpu_kernel  # noqa: E402

KERNELS = Path(__file__).parents[2] / 'kernels'


@pytest.fixture(autouse=True)
def poisoned_memory(monkeypatch):
    for module, name in ((cpu, 'empty'), (cpu_threads, 'scratch')):
        monkeypatch.setattr(module, name, lambda *shape: torch.full(shape, float('nan'), dtype=torch.float32))


@pytest.fixture
def ran(monkeypatch):
    """Names of the Numba workers that ran."""
    names, real = [], cpu_threads.Worker.__call__

    def call(self, *args):
        names.append('forward' if self is cpu_kernel.forward else 'backward')
        return real(self, *args)

    monkeypatch.setattr(cpu_threads.Worker, '__call__', call)
    return names


def tensors(both=False, dtype=torch.float32, seed=0, **sizes):
    """Inputs with positive steps: the states decay with and without softplus."""
    case = cases.Case('free', both=both, softplus=False, **({'L': 70} | sizes))
    return {name: x if x is None else x.to(dtype) for name, x in cases.make_inputs(case, seed).items()}


# ---- values ----


@pytest.mark.parametrize('case', cases.CASES, ids=str)
def test_float32_outputs_and_gradients(case, ran):
    assert cases.problems(case, 'numba') == []
    assert ran == ['forward', 'backward']


LOW_PRECISION = ('197-tokens-both-N16-D-past-a-tile', 'one-past-two-chunks-reverse', 'three-groups', 'constant-B')


@pytest.mark.parametrize('dtype', [torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize('case', [case for case in cases.CASES if case.label in LOW_PRECISION], ids=str)
def test_low_precision_outputs_and_gradients(case, dtype, ran):
    assert cases.problems(case, 'numba', dtype) == []
    assert ran == ['forward', 'backward']


def test_case_list_covers_what_it_promises():
    chosen = cases.CASES
    assert {case.L for case in chosen} >= {1, 2, 3, 49, 197, cpu_kernel.CH, cpu_kernel.CH + 1, 2 * cpu_kernel.CH + 1}
    assert {case.N for case in chosen} >= {1, 8, 16, 17, 64}
    assert any(case.D > cpu_kernel.LANES * cpu_kernel.SLAB and case.D % cpu_kernel.LANES for case in chosen)
    assert len({case.label for case in chosen}) == len(chosen)


@pytest.mark.parametrize('seed', range(3))
def test_error_where_states_decay_slowly(seed):
    """An exponential whose error is the same for neighbouring steps shows here: it adds up over the memory's length."""
    generator = torch.Generator().manual_seed(seed)
    L, D, N = 1500, 24, 2
    u, dt, B, C = (torch.randn(1, L, n, generator=generator) for n in (D, D, N, N))
    A = -0.004 - 0.02 * torch.rand(D, N, generator=generator)
    x = [u, dt * 0.5 + 2, A, B, C]
    exact = selective_scan(*(t.double() for t in x), dt_softplus=True, backend='torch')
    plain, ours = (selective_scan(*x, dt_softplus=True, backend=name).double() for name in ('torch', 'numba'))
    assert (ours - exact).norm() <= 1.5 * (plain - exact).norm()


@pytest.mark.parametrize('seed', range(10))
def test_error_is_at_most_twice_that_of_the_float32_reference(seed):
    generator = torch.Generator().manual_seed(seed)
    L, D, N = 512, 48, 16
    exact = {
        'u': torch.randn(1, L, D, generator=generator),
        'dt': 0.5 * torch.randn(1, L, D, generator=generator) - 3,
        'A': -torch.arange(1.0, N + 1).repeat(D, 1),
        'B': torch.randn(1, L, N, generator=generator),
        'C': torch.randn(1, L, N, generator=generator),
        'D': torch.ones(D),
        'z': torch.randn(1, L, D, generator=generator),
    }
    double = {name: x.double() for name, x in exact.items()}
    truth = selective_scan(**double, dt_softplus=True, backend='torch')
    plain, ours = (selective_scan(**exact, dt_softplus=True, backend=name) - truth for name in ('torch', 'numba'))
    assert ours.square().mean() <= 4 * plain.square().mean()
    assert ours.abs().max() <= 2 * plain.abs().max()


@pytest.mark.parametrize('backend', ['torch', 'numba'])
def test_extreme_steps_stay_finite_and_right(backend):
    L, D, N = 130, 20, 3
    generator = torch.Generator().manual_seed(0)
    u, z = torch.randn(2, 1, L, D, generator=generator)
    B, C = torch.randn(2, 1, L, N, generator=generator)
    dt = torch.tensor([50.0, 1e-6, 1.0, 0.0]).repeat_interleave(5).expand(1, L, D).contiguous()
    dt[:, ::7] = 1e-6
    A = torch.tensor([-16.0, -1e5, -1e-3]).repeat(D, 1)
    wide = [x.double() for x in (u, dt, A, B, C)]
    for softplus in (False, True):
        truth, state = selective_scan(
            *wide, z=z.double(), dt_softplus=softplus, return_last_state=True, backend='torch'
        )
        y, last = selective_scan(u, dt, A, B, C, z=z, dt_softplus=softplus, return_last_state=True, backend=backend)
        torch.testing.assert_close(y.double(), truth, rtol=2e-5, atol=2e-5)
        torch.testing.assert_close(last.double(), state, rtol=2e-5, atol=2e-5)
    leaves = [x.requires_grad_() for x in (u, dt, A, B, C)]
    grads = torch.autograd.grad(selective_scan(*leaves, backend=backend).square().sum(), leaves)
    exact = [x.detach().double().requires_grad_() for x in leaves]
    truth = torch.autograd.grad(selective_scan(*exact, backend='torch').square().sum(), exact)
    for name, got, want in zip(('u', 'dt', 'A', 'B', 'C'), grads, truth, strict=True):
        assert cases.error(got, want) < 1e-5, name


def test_growing_states_overflow_to_inf_like_the_reference():
    x = {'u': torch.ones(1, 4, 1), 'dt': torch.full((1, 4, 1), 60.0), 'A': torch.ones(1, 1)}
    row = torch.ones(1, 4, 1)
    want, got = (selective_scan(**x, B=row, C=row, backend=name) for name in ('torch', 'numba'))
    assert want.isinf().any()
    torch.testing.assert_close(got, want, rtol=1e-5, atol=0)


def test_nan_input_gives_nan_from_there_on_and_only_in_its_channel():
    x = tensors(L=70, D=20)
    x['u'][0, 66, 3] = float('nan')
    y = selective_scan(**x, backend='numba')
    assert y[0, 66:, 3].isnan().all()
    assert y[0, :66].isfinite().all() and y[1].isfinite().all() and y[0, :, :3].isfinite().all()


def test_20000_tokens():
    generator = torch.Generator().manual_seed(0)
    L, D, N = 20000, 4, 2
    u = torch.randn(1, L, D, generator=generator)
    dt = 0.5 * torch.randn(1, L, D, generator=generator) - 6
    B, C = torch.randn(2, 1, L, N, generator=generator)
    A = -torch.rand(D, N, generator=generator) - 0.01
    truth = selective_scan(*(x.double() for x in (u, dt, A, B, C)), dt_softplus=True, backend='torch')
    plain, ours = (selective_scan(u, dt, A, B, C, dt_softplus=True, backend=name) for name in ('torch', 'numba'))
    assert ours.isfinite().all()
    assert cases.error(ours, truth) <= 2 * cases.error(plain, truth)


def test_reference_equals_a_scalar_loop():
    x = tensors(L=5, D=4, N=3, G=2, dtype=torch.float64)
    x = {name: value[:1] if name in ('u', 'dt', 'z', 'B', 'C') else value for name, value in x.items()}
    want = torch.empty(1, 5, 4, dtype=torch.float64)
    for d in range(4):
        h = [0.0] * 3
        for step in range(5):
            delta = F.softplus(x['dt'][0, step, d] + x['dt_bias'][d]).item()
            u, z = x['u'][0, step, d].item(), x['z'][0, step, d].item()
            y = x['D'][d].item() * u
            for n in range(3):
                decay = 2.718281828459045 ** (delta * x['A'][d, n].item())
                h[n] = decay * h[n] + delta * x['B'][0, step, d // 2, n].item() * u
                y += x['C'][0, step, d // 2, n].item() * h[n]
            want[0, step, d] = y * z / (1 + 2.718281828459045 ** (-z))
    torch.testing.assert_close(selective_scan(**x, dt_softplus=True), want, rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize('label', ['three-tokens-reverse', 'two-tokens-both'])
@pytest.mark.parametrize('form', [{}, {'G': 2}, {'const_b': True, 'const_c': True}], ids=str)
def test_gradcheck_of_the_reference(label, form):
    case = next(case for case in cases.CASES if case.label == label)
    case = cases.Case(**(vars(case) | {'D': 4, 'N': 2, 'scale': 0.5 if case.both else 1.0} | form))
    inputs = {name: x.requires_grad_() for name, x in cases.make_inputs(case).items()}

    def call(*values):
        named = dict(zip(inputs, values, strict=True))
        if case.both:
            return bidirectional_selective_scan(**named, dt_softplus=True, scale=0.5, backend='torch')
        return selective_scan(**named, dt_softplus=True, reverse=True, return_last_state=True, backend='torch')

    assert torch.autograd.gradcheck(call, list(inputs.values()))


@pytest.mark.parametrize('backend', ['torch', 'numba'])
def test_directions_equal_flips(backend):
    x = tensors(both=True, L=67, D=20)
    pair = ('u', 'dt', 'B', 'C')

    def one(k, flip, **options):
        part = {name: value[k] if name != 'z' else value for name, value in x.items()}
        if flip:
            part |= {name: part[name].flip(1) for name in (*pair, 'z')}
        return selective_scan(**part, dt_softplus=True, backend=backend, **options)

    flipped = one(1, flip=True).flip(1)
    torch.testing.assert_close(
        one(1, flip=False, reverse=True), flipped, rtol=0, atol=0 if backend == 'numba' else 1e-6
    )
    both = bidirectional_selective_scan(**x, dt_softplus=True, scale=0.5, backend=backend)
    torch.testing.assert_close(both, 0.5 * (one(0, flip=False) + flipped), rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize(
    'form', [{}, {'G': 1}, {'G': 3}, {'const_b': True}, {'const_c': True}, {'const_b': True, 'const_c': True}], ids=str
)
def test_selective_scan_fn_layouts(form):
    x = tensors(L=50, D=12, **form)
    want, state = selective_scan(**x, dt_softplus=True, return_last_state=True)
    first = {name: x[name].transpose(1, 2).contiguous() for name in ('u', 'dt', 'z')}
    B, C = (v if v.dim() == 2 else v.movedim(1, -1).contiguous() for v in (x['B'], x['C']))
    out, last = selective_scan_fn(
        first['u'], first['dt'], x['A'], B, C, x['D'], first['z'], x['dt_bias'], True, return_last_state=True
    )
    assert out.is_contiguous()
    assert torch.equal(out, want.transpose(1, 2)) and torch.equal(last, state)
    alone = selective_scan_fn(first['u'], first['dt'], x['A'], B, C, x['D'], first['z'], x['dt_bias'], True)
    assert torch.equal(alone, out)


def test_selective_scan_fn_equals_the_yardstick_loop():
    x = tensors(L=70, D=12, dtype=torch.float64)
    args = [x['u'].mT, x['dt'].mT, x['A'], x['B'].mT, x['C'].mT, x['D'], x['z'].mT, x['dt_bias']]
    want = cases.yardstick(*args)
    torch.testing.assert_close(selective_scan_fn(*args, delta_softplus=True), want, rtol=1e-12, atol=1e-12)
    low = [a.float() for a in args]
    assert cases.error(selective_scan_fn(*low, delta_softplus=True), want) < 1e-6


# ---- memory, autograd, operators ----


def test_non_contiguous_and_expanded_inputs(ran):
    x = tensors(both=True, L=50, D=20, N=8)
    want = bidirectional_selective_scan(**x, dt_softplus=True)
    rows = torch.cat([x['B'], x['dt'][..., :3], x['C']], -1)
    odd = x | {
        'u': x['u'].transpose(1, 3).contiguous().transpose(1, 3),
        'dt': torch.stack([x['dt'], x['dt']], -1)[..., 0],
        'A': x['A'].mT.contiguous().mT,
        'B': rows[..., :8],
        'C': rows[..., 11:],
        'D': torch.stack([x['D'], x['D']], -1)[..., 1],
        'z': x['z'].mT.contiguous().mT,
    }
    assert not any(odd[name].is_contiguous() for name in 'u dt A B C D z'.split())
    assert torch.equal(bidirectional_selective_scan(**odd, dt_softplus=True), want)
    shared = x | {name: x[name][:1].expand_as(x[name]) for name in ('u', 'dt', 'B')}
    copied = {name: value.clone() for name, value in shared.items()}
    assert torch.equal(
        bidirectional_selective_scan(**shared, dt_softplus=True),
        bidirectional_selective_scan(**copied, dt_softplus=True),
    )
    leaf = x['u'][:1].clone().requires_grad_()
    bidirectional_selective_scan(**(shared | {'u': leaf.expand_as(x['u'])}), dt_softplus=True).sum().backward()
    twin = shared['u'].clone().requires_grad_()
    bidirectional_selective_scan(**(shared | {'u': twin}), dt_softplus=True).sum().backward()
    torch.testing.assert_close(leaf.grad, twin.grad.sum(0, keepdim=True))
    assert set(ran) == {'forward', 'backward'}


def test_backward_twice_on_one_graph_and_equal_bits_on_any_number_of_threads():
    x = {name: v.requires_grad_() for name, v in tensors(both=True, L=130, D=150).items()}
    leaves, before, results = list(x.values()), torch.get_num_threads(), []
    try:
        for threads in (1, 2, 3, 2):
            torch.set_num_threads(threads)
            y = bidirectional_selective_scan(**x, dt_softplus=True)
            for _ in range(2):
                results.append((y, *torch.autograd.grad(y, leaves, torch.ones_like(y), retain_graph=True)))
    finally:
        torch.set_num_threads(before)
    for other in results[1:]:
        assert all(torch.equal(a, b) for a, b in zip(results[0], other, strict=True))


def test_gradients_only_where_asked():
    x = tensors(L=66, D=20)
    x['A'].requires_grad_()
    alone = torch.autograd.grad(selective_scan(**x).sum(), x['A'])[0]
    x['u'].requires_grad_()
    assert torch.equal(torch.autograd.grad(selective_scan(**x).sum(), x['A'])[0], alone)


def test_memory_kept_for_backward_is_chunk_states():
    x = {name: v.requires_grad_() for name, v in tensors(L=130, D=20, N=16).items()}
    kept = []
    with torch.autograd.graph.saved_tensors_hooks(lambda t: (kept.append(t), t)[1], lambda t: t):
        selective_scan(**x)
    extra = [t.shape for t in kept if not any(t.data_ptr() == v.data_ptr() for v in x.values())]
    assert extra == [(2 * 3 * 16 * 20,)]  # images, chunks, N, D
    with torch.no_grad():
        states = cpu.forward_op(*op_inputs(x), True, False, 1.0, False)[2]
    assert states.numel() == 0


def op_inputs(x):
    """Arguments of the operator: one direction, one group."""
    row = {name: v.detach().unsqueeze(0) for name, v in x.items() if name != 'z'}
    B, C = (row[name].unsqueeze(3) for name in 'BC')
    return [row['u'], row['dt'], row['A'], B, C, row['D'], x['z'], row['dt_bias']]


@pytest.mark.parametrize('optional', [True, False])
def test_opcheck(optional, monkeypatch):
    monkeypatch.undo()  # opcheck compares two runs, and unused results are not written
    args = op_inputs(tensors(L=3, D=5, N=2))
    if not optional:
        args[5:] = [None, None, None]
    torch.library.opcheck(cpu.forward_op, (*args, True, False, 0.5, False))
    leaves = [None if a is None else a.clone().requires_grad_() for a in args]
    torch.library.opcheck(cpu.forward_op, (*leaves, True, False, 0.5, True))
    y, last, states = cpu.forward_op(*args, True, False, 0.5, True)
    torch.library.opcheck(cpu.backward_op, (y, last, *args, states, True, False, 0.5))


def test_double_backward_is_refused_clearly():
    x = {name: v.requires_grad_() for name, v in tensors(L=5, D=3, N=2).items()}
    grad = torch.autograd.grad(selective_scan(**x).sum(), x['u'], create_graph=True)[0]
    with pytest.raises(RuntimeError, match="backend 'numba' has no second derivative"):
        torch.autograd.grad(grad.sum(), x['u'])


def test_gradient_checkpointing():
    x = {name: v.requires_grad_() for name, v in tensors(L=66, D=20).items()}
    names = list(x)

    def call(*values):
        return selective_scan(**dict(zip(names, values, strict=True)), dt_softplus=True)

    want = torch.autograd.grad(call(*x.values()).sum(), list(x.values()))
    y = torch.utils.checkpoint.checkpoint(call, *x.values(), use_reentrant=False)
    assert all(map(torch.equal, torch.autograd.grad(y.sum(), list(x.values())), want))


def test_torch_compile_without_graph_breaks():
    x = {name: v.requires_grad_() for name, v in tensors(both=True, L=66, D=20).items()}

    def call(**values):
        return bidirectional_selective_scan(**values, dt_softplus=True, scale=0.5)

    want, got = call(**x), torch.compile(call, fullgraph=True, backend='aot_eager')(**x)
    assert torch.equal(got, want)
    grads = [torch.autograd.grad(y.sum(), list(x.values())) for y in (want, got)]
    assert all(map(torch.equal, *grads))


def test_autocast_narrows_activations_and_keeps_parameters(ran):
    x = tensors(L=50, D=20)
    low = {name: v.bfloat16() if name in ('u', 'dt', 'z', 'B', 'C') else v for name, v in x.items()}
    want = selective_scan(**low, dt_softplus=True)
    with torch.autocast('cpu', dtype=torch.bfloat16):
        got = selective_scan(**x, dt_softplus=True)
        mixed = selective_scan(**(low | {'u': x['u']}), dt_softplus=True)
        plain = selective_scan(**x, dt_softplus=True, backend='torch')
    assert got.dtype == plain.dtype == torch.bfloat16
    assert torch.equal(got, want) and torch.equal(mixed, want)
    torch.testing.assert_close(plain, want)
    assert set(ran) == {'forward'}


# ---- dispatch ----


def test_dispatch_prefers_numba_on_the_cpu_and_torch_in_float64(ran):
    selective_scan(**tensors(L=3))
    assert ran == ['forward']
    selective_scan(**tensors(L=3, dtype=torch.float64))
    selective_scan(**tensors(L=3), backend='torch')
    assert ran == ['forward']


@pytest.mark.parametrize(
    'backend, dtype, error, message',
    [
        ('triton', torch.float32, RuntimeError, "backend 'triton' cannot run this: tensors are on cpu"),
        ('numba', torch.float64, RuntimeError, "backend 'numba' cannot run this: .*float64"),
        ('cuda', torch.float32, ValueError, "unknown backend 'cuda'.*'triton', 'numba', 'torch'"),
    ],
)
def test_a_forced_backend_never_falls_back(backend, dtype, error, message):
    with pytest.raises(error, match=message):
        selective_scan(**tensors(L=3, dtype=dtype), backend=backend)


def test_without_numba_torch_runs_and_numba_says_why(monkeypatch, ran):
    monkeypatch.setattr('ssm_kernels.dispatch.missing_package', lambda name: name == 'numba')
    selective_scan(**tensors(L=3))
    assert ran == []
    with pytest.raises(RuntimeError, match='pip install numba'):
        selective_scan(**tensors(L=3), backend='numba')


def test_meta_tensors_go_to_the_reference():
    x = {name: v.to('meta') for name, v in tensors(L=3).items()}
    assert selective_scan(**x).shape == x['u'].shape
    with pytest.raises(RuntimeError, match='tensors are on meta'):
        selective_scan(**x, backend='numba')


# ---- bad input ----


BAD = {
    'dt-shape': ({'dt': (2, 7, 5)}, r'dt has shape \(2, 7, 5\), must equal that of u, \(2, 7, 6\)'),
    'u-rank': ({'u': (7, 6)}, r'u has shape \(7, 6\), must be \(B, L, D\)'),
    'u-empty-batch': ({'u': (0, 7, 6)}, r'u has shape \(0, 7, 6\); every size must be at least 1'),
    'A-channels': ({'A': (5, 4)}, r'A has shape \(5, 4\), must be \(6, N\) for u of shape \(2, 7, 6\)'),
    'A-state-0': ({'A': (6, 0)}, r'A has shape \(6, 0\); every size must be at least 1'),
    'A-state-257': ({'A': (6, 257)}, 'state size 257, legal are 1 to 256'),
    'B-tokens': ({'B': (2, 8, 4)}, r'B has shape \(2, 8, 4\), must be \(6, 4\), \(2, 7, 4\) or \(2, 7, G, 4\)'),
    'C-state': ({'C': (2, 7, 5)}, r'C has shape \(2, 7, 5\).* A of \(6, 4\)'),
    'C-rank': ({'C': (4,)}, r'C has shape \(4,\), must be'),
    'B-groups': ({'B': (2, 7, 4, 4)}, '4 groups must divide the 6 channels of u'),
    'groups-differ': ({'B': (2, 7, 2, 4), 'C': (2, 7, 3, 4)}, 'C has 3 groups, B has 2'),
    'D-shape': ({'D': (1,)}, r'D has shape \(1,\), must be \(6,\)'),
    'z-shape': ({'z': (2, 6, 7)}, r'z has shape \(2, 6, 7\), must be \(2, 7, 6\)'),
    'bias-shape': ({'dt_bias': (7,)}, r'dt_bias has shape \(7,\), must be \(6,\)'),
}
SHAPES = {'u': (2, 7, 6), 'dt': (2, 7, 6), 'A': (6, 4), 'B': (2, 7, 4), 'C': (2, 7, 4)}


@pytest.mark.parametrize('change, message', BAD.values(), ids=BAD)
def test_bad_shapes(change, message):
    with pytest.raises(ValueError, match='selective_scan: .*' + message):
        selective_scan(**{name: torch.ones(shape) for name, shape in (SHAPES | change).items()})


def test_bad_shapes_of_the_bidirectional_and_the_drop_in_function():
    x = {name: torch.ones(2, *shape) for name, shape in SHAPES.items()}
    with pytest.raises(ValueError, match=r'u has shape \(3, 2, 7, 6\), must be \(2, B, L, D\)'):
        bidirectional_selective_scan(**(x | {'u': torch.ones(3, 2, 7, 6)}))
    with pytest.raises(ValueError, match=r'z has shape \(2, 2, 7, 6\), must be \(2, 7, 6\)'):
        bidirectional_selective_scan(**x, z=torch.ones(2, 2, 7, 6))
    first = [torch.ones(2, 6, 7), torch.ones(2, 6, 7), torch.ones(6, 4), torch.ones(2, 7, 4), torch.ones(2, 4, 7)]
    with pytest.raises(ValueError, match=r'selective_scan_fn: B has shape \(2, 7, 4\), must be \(6, 4\), \(2, 4, 7\)'):
        selective_scan_fn(*first)
    with pytest.raises(ValueError, match='selective_scan_fn: delta has shape'):
        selective_scan_fn(first[0], torch.ones(2, 6, 8), *first[2:])


@pytest.mark.parametrize(
    'name, value, message',
    [
        ('u', torch.ones(2, 7, 6, dtype=torch.int64), 'u has dtype torch.int64; legal are torch.float32'),
        ('A', torch.ones(6, 4, dtype=torch.complex64), 'A has dtype torch.complex64; legal are'),
        ('dt', torch.ones(2, 7, 6, dtype=torch.bfloat16), 'dt has dtype torch.bfloat16, u has torch.float32'),
        ('B', torch.ones(2, 7, 4, dtype=torch.float64), 'B has dtype torch.float64, u has torch.float32'),
        ('A', torch.ones(6, 4, dtype=torch.float16), 'A has dtype torch.float16, u has torch.float32'),
        ('C', torch.ones(2, 7, 4, device='meta'), 'C is on meta, u is on cpu'),
        ('A', [[1.0]], 'A must be a tensor, got list'),
        ('dt', None, 'dt must be a tensor, got NoneType'),
    ],
)
def test_bad_types(name, value, message):
    x = {key: torch.ones(shape) for key, shape in SHAPES.items()} | {name: value}
    with pytest.raises(ValueError, match=message):
        selective_scan(**x)


# ---- processes and threads ----


def python(code: str, **environment: str) -> str:
    done = subprocess.run(
        [sys.executable, '-c', code],
        capture_output=True,
        text=True,
        timeout=300,
        cwd=KERNELS,
        env=os.environ | {'PYTHONPATH': str(KERNELS)} | environment,
    )
    assert done.returncode == 0, done.stderr[-2000:]
    return done.stdout


@pytest.fixture(scope='module')
def compiled():
    for worker in (cpu_kernel.forward, cpu_kernel.backward):
        worker.entry()


def test_a_second_process_loads_compiled_code_from_disk(compiled):
    code = (
        'from ssm_kernels.ops.selective_scan import cpu_kernel\n'
        'for worker in (cpu_kernel.forward, cpu_kernel.backward):\n'
        '    worker.entry(); print(worker.compiled.cache_hits)\n'
    )
    assert python(code).split() == ['1', '1']


def test_without_a_writable_cache_it_compiles_without_one(monkeypatch):
    from numba.core.ccallback import CFunc

    def refuse(compiled):
        raise RuntimeError('cannot cache function: no locator available')

    def make(stamp):
        def worker(params):
            pass

        return worker

    monkeypatch.setattr(CFunc, 'enable_caching', refuse)
    assert cpu_vectors.compile_worker(make, cpu_kernel.PARAMS).address


def test_environment_and_numba_settings_are_left_alone(compiled):
    code = (
        'import os, torch, numba\n'
        'from ssm_kernels import selective_scan\n'
        'def state():\n'
        '    ours = {k: v for k, v in os.environ.items() if not k.startswith("TORCH")}  # PyTorch sets its own\n'
        '    return ours, {k: repr(v) for k, v in vars(numba.config).items()}\n'
        'before = state()\n'
        'x, row = torch.ones(2, 9, 200), torch.ones(2, 9, 3)\n'
        'selective_scan(x, x, -torch.ones(200, 3), row, row, backend="numba")\n'
        'print(state() == before)\n'
        'try: print(numba.threading_layer())\n'
        'except ValueError: print("no threading layer")\n'
    )
    assert python(code).splitlines() == ['True', 'no threading layer']


AVX512 = '+avx,+avx2,+fma,+f16c,+bmi,+bmi2,+popcnt,+avx512f,+avx512vl,+avx512bw,+avx512dq,+avx512cd'


@pytest.mark.skipif(platform.machine() not in ('x86_64', 'AMD64'), reason='x86 only')
def test_avx512_gets_whole_registers():
    code = (
        'import re\n'
        'from numba import types\n'
        'from ssm_kernels.ops.selective_scan import cpu_kernel\n'
        'cpu_kernel.scan_rows.compile((types.int64,) * 9)\n'
        'code = next(iter(cpu_kernel.scan_rows.inspect_asm().values()))\n'
        'print(cpu_kernel.LANES, len(re.findall("vfmadd.*%zmm", code)), len(re.findall("vfmadd.*%ymm", code)))\n'
    )
    lanes, whole, half = map(int, python(code, NUMBA_CPU_NAME='skylake-avx512', NUMBA_CPU_FEATURES=AVX512).split())
    assert lanes == 32 and whole > 0 and half == 0


@pytest.mark.slow
def test_values_with_the_narrowest_vectors():
    code = (
        'import sys; sys.path.insert(0, "benchmarks"); import cases\n'
        'from ssm_kernels.cpu_vectors import LANES\n'
        'found = {case.label: cases.problems(case, "numba") for case in cases.CASES}\n'
        'print(LANES, {label: what for label, what in found.items() if what})\n'
    )
    assert python(code, NUMBA_CPU_NAME='generic', NUMBA_CPU_FEATURES='').strip() == '8 {}'


def test_several_python_threads_at_once(compiled):
    x = {name: v.requires_grad_() for name, v in tensors(both=True, L=200, D=150).items()}
    leaves = list(x.values())

    def call():
        y = bidirectional_selective_scan(**x, dt_softplus=True)
        return (y.detach(), *torch.autograd.grad(y.sum(), leaves))

    want, got = call(), []
    threads = [threading.Thread(target=lambda: got.extend(call() for _ in range(5))) for _ in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert len(got) == 20
    assert all(torch.equal(a, b) for result in got for a, b in zip(want, result, strict=True))


def test_python_threads_where_openmp_is_missing(compiled, monkeypatch):
    x = tensors(both=True, L=130, D=150)
    want, before = bidirectional_selective_scan(**x, dt_softplus=True), torch.get_num_threads()
    monkeypatch.setattr(cpu_threads, 'openmp', lambda: None)
    try:
        torch.set_num_threads(3)
        assert torch.equal(bidirectional_selective_scan(**x, dt_softplus=True), want)
    finally:
        torch.set_num_threads(before)


FORKED = """
import os, sys, torch
from torch.utils.data import DataLoader, Dataset
from ssm_kernels import selective_scan
torch.set_num_threads(2)
g = torch.Generator().manual_seed(0)
u, dt = torch.randn(2, 1, 200, 150, generator=g)
B, C = torch.randn(2, 1, 200, 4, generator=g)
A = -torch.ones(150, 4)
scan = lambda: selective_scan(u, dt, A, B, C, dt_softplus=True, backend='numba')
want = scan()  # the parent has used its threads before it forks

class Scans(Dataset):
    def __len__(self): return 4
    def __getitem__(self, i): return torch.equal(scan(), want)

print(all(bool(ok) for batch in DataLoader(Scans(), num_workers=2, multiprocessing_context='fork') for ok in batch))
child = os.fork()
if child == 0:
    torch.set_num_threads(2)
    os._exit(0 if torch.equal(scan(), want) else 3)
print(os.waitpid(child, 0)[1] == 0)
"""


@pytest.mark.skipif(not hasattr(os, 'fork'), reason='no fork on this system')
def test_forked_workers_after_the_parent_ran_in_parallel(compiled):
    gc.collect()
    assert python(FORKED).split() == ['True', 'True']
