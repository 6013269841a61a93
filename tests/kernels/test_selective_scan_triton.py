"""The Triton selective scan against the float64 reference, wherever triton_runs can run it."""

# K directions, B batch, L tokens, D channels, N state size, G groups of channels

from types import SimpleNamespace

import pytest
import torch

from ssm_kernels import bidirectional_selective_scan, dispatch, selective_scan

pytest.importorskip('triton')
import cases  # noqa: E402
from cases import Case  # noqa: E402
from triton_runs import (  # noqa: E402
    DEVICE,
    in_full,
    in_the_first_process,
    poison,
    put_triton_first,
    run_compiled,
    run_in_interpreter,
    skip_in_interpreter,
    slow_if_compiled,
    slow_when_compiled,
    where_it_runs,
)

from ssm_kernels.ops import selective_scan as room  # noqa: E402
from ssm_kernels.ops.selective_scan import gpu  # noqa: E402

TRITON = room.BACKENDS[0]


@in_the_first_process
@pytest.mark.slow
def test_in_the_interpreter():
    run_in_interpreter(__file__)


@in_the_first_process
@pytest.mark.compiled
def test_compiled():
    run_compiled(__file__)


@in_full
def test_compiled_in_full(capability, marks):
    run_compiled(__file__, capability, marks=marks)


@pytest.fixture
def poisoned_memory(monkeypatch):
    poison(monkeypatch, gpu)


@pytest.fixture(autouse=True)
def triton_row(monkeypatch):
    return put_triton_first(monkeypatch, room, gpu.selective_scan_triton)


@pytest.fixture
def cut(monkeypatch):
    """Fixes how tokens are cut: tokens per block, blocks per chunk."""

    def fix(block, per_chunk=1):
        monkeypatch.setattr(gpu, 'BLOCK', block)
        monkeypatch.setattr(gpu, 'plan_chunks', lambda length, programs, fixed: (block, per_chunk))

    return fix


ROWS = (
    Case('one-token', L=1, D=5),
    Case('two-tokens-both', L=2, D=5, both=True),
    Case('three-tokens-reverse-N16-D-past-a-tile', L=3, D=40, N=16, batch=1, reverse=True),
    Case('49-tokens-both-D-past-a-tile', L=49, D=33, N=3, batch=1, both=True, scale=0.5),
    Case('197-tokens', L=197, D=7, N=2, batch=1),
    Case('one-past-a-chunk-N5-reverse', L=65, D=6, N=5, batch=1, reverse=True),
    Case('one-past-a-chunk-N16', L=65, D=8, N=16, batch=1),
    Case('three-groups-both', L=9, D=9, N=5, G=3, batch=1, both=True),
    Case('N64-both', L=3, D=4, N=64, batch=1, both=True),
    Case('N1', L=5, D=4, N=1),
    Case('no-options-both', L=5, D=6, both=True, skip=False, gate=False, bias=False, softplus=False),
    Case('only-skip', L=4, D=6, gate=False, bias=False, softplus=False),
    Case('only-gate-both', L=4, D=6, both=True, skip=False, bias=False, softplus=False, scale=2.0),
    Case('only-bias', L=4, D=6, skip=False, gate=False, softplus=False),
    Case('only-softplus', L=4, D=6, skip=False, gate=False, bias=False),
    Case('groups-of-one-channel-both', L=4, D=3, N=3, G=3, batch=1, both=True),
    Case('constant-B', L=5, D=6, const_b=True),
    Case('constant-C-both', L=5, D=6, const_c=True, both=True, batch=1),
    Case('constant-B-and-C', L=5, D=6, N=16, const_b=True, const_c=True, reverse=True),
    Case('constant-B-grouped-C', L=4, D=6, G=2, const_b=True),
    Case('constant-B-N64', L=3, D=4, N=64, batch=1, const_b=True),
)


QUICK = (
    'three-tokens-reverse-N16-D-past-a-tile',
    '49-tokens-both-D-past-a-tile',
    'one-past-a-chunk-N5-reverse',
    'three-groups-both',
    'no-options-both',
    'constant-B',
)


@where_it_runs
@pytest.mark.parametrize('case', slow_when_compiled(ROWS, *QUICK), ids=str)
def test_float32_outputs_and_gradients(case, triton_row):
    assert cases.problems(case, 'triton') == []
    assert len(triton_row) == 1


@where_it_runs
@pytest.mark.parametrize('dtype', [torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize(
    'case',
    slow_when_compiled(
        [Case('both-N16', L=9, D=8, N=16, batch=1, both=True), Case('grouped-N5', L=17, D=6, N=5, G=2, batch=1)],
        'grouped-N5',
    ),
    ids=str,
)
def test_low_precision_outputs_and_gradients(case, dtype, triton_row):
    assert cases.problems(case, 'triton', dtype) == []
    assert len(triton_row) == 1


@where_it_runs
@skip_in_interpreter
@pytest.mark.parametrize('dtype', [torch.float32, torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize('case', slow_when_compiled(cases.CASES), ids=str)
def test_shared_cases(case, dtype):
    assert cases.problems(case, 'triton', dtype) == []


def tensors(case, dtype=torch.float32, seed=0):
    return {name: x if x is None else x.to(DEVICE, dtype) for name, x in cases.make_inputs(case, seed).items()}


@where_it_runs
@pytest.mark.parametrize('both', [False, True])
def test_inference_keeps_no_states_and_cuts_finer(both, monkeypatch):
    kept, real = [], gpu.empty
    monkeypatch.setattr(gpu, 'empty', lambda shape, dtype, like: (kept.append(shape), real(shape, dtype, like))[1])
    x = tensors(Case('free', L=41, D=5, batch=1, both=both))
    scan = bidirectional_selective_scan if both else selective_scan
    y = scan(**x, dt_softplus=True, backend='triton')
    exact = scan(**{n: t.double() for n, t in x.items()}, dt_softplus=True, backend='torch')
    assert cases.error(y, exact) < 1e-6
    states = (1 + both, 1, 2, 5, 8)  # two chunks of 24 tokens
    assert states in kept and all(len(shape) < 5 or shape == states for shape in kept)


@slow_if_compiled
@where_it_runs
@pytest.mark.parametrize('both', [False, True])
def test_chunks_change_rounding_only(both, cut):
    case = Case('free', L=19 if both else 33, D=4, N=2, batch=1, both=both, reverse=not both)
    inputs = cases.make_inputs(case)
    cut(case.L)
    whole = cases.run(case, inputs, torch.float32, 'triton')
    for block, per_chunk in ((7, 1), (4, 2)) if both else ((7, 1), (16, 1), (64, 1)):
        cut(block, per_chunk)
        for name, x in cases.run(case, inputs, torch.float32, 'triton').items():
            assert cases.error(x, whole[name].double()) < 1e-6, (name, block, per_chunk)


@slow_if_compiled
@where_it_runs
def test_two_runs_and_two_backwards_give_the_same_bits(cut):
    cut(4)
    case = Case('free', L=9, D=5, N=4, batch=1, both=True)
    x = {name: t.requires_grad_() for name, t in tensors(case).items()}
    ys = [bidirectional_selective_scan(**x, dt_softplus=True, backend='triton') for _ in range(2)]
    assert torch.equal(*ys)
    first, again = (torch.autograd.grad(ys[0].sum(), list(x.values()), retain_graph=True) for _ in range(2))
    other = torch.autograd.grad(ys[1].sum(), list(x.values()))
    for name, a, b, c in zip(x, first, again, other, strict=True):
        assert torch.equal(a, b) and torch.equal(a, c), name


@where_it_runs
def test_programs_that_loop_over_several_pieces_of_work(cut, monkeypatch):
    cut(4)
    case = Case('free', L=11, D=5, N=2)
    inputs = cases.make_inputs(case)
    expected = cases.run(case, inputs, torch.float32, 'triton')
    monkeypatch.setattr(gpu, 'MAX_BACKWARD_PROGRAMS', 4)  # for six pieces
    for name, x in cases.run(case, inputs, torch.float32, 'triton').items():
        assert torch.equal(x, expected[name]), name


@slow_if_compiled
@where_it_runs
def test_reverse_equals_the_scan_of_flipped_tokens(cut):
    cut(8)
    case = Case('free', L=16, D=5, batch=1)
    x = tensors(case)
    flipped = {name: t.flip(1) if name in ('u', 'dt', 'B', 'C', 'z') else t for name, t in x.items()}
    options = dict(dt_softplus=True, return_last_state=True, backend='triton')
    y, state = selective_scan(**x, reverse=True, **options)
    y_flipped, state_flipped = selective_scan(**flipped, **options)
    assert torch.equal(y, y_flipped.flip(1)) and torch.equal(state, state_flipped)


@slow_if_compiled
@where_it_runs
@pytest.mark.parametrize(
    ('width', 'dtype', 'pack'),
    [(44, torch.bfloat16, 4), (42, torch.bfloat16, 2), (43, torch.bfloat16, 1), (44, torch.float32, 2)],
    ids=str,
)
def test_slices_of_projections_are_read_in_place(width, dtype, pack):
    x = tensors(Case('free', L=3, D=4, N=16), dtype)
    row = torch.zeros(2, 3, width, dtype=dtype, device=DEVICE)
    row[..., width - 32 : width - 16], row[..., width - 16 :] = x['B'], x['C']
    gated = torch.cat([x['u'], x['z']], -1)
    sliced = x | {
        'u': gated[..., :4],
        'z': gated[..., 4:],
        'B': row[..., width - 32 : width - 16],
        'C': row[..., width - 16 :],
    }
    stacked = [sliced[name].unsqueeze(0) for name in ('u', 'dt', 'A')]
    stacked += [sliced[name].unsqueeze(0).unsqueeze(3) for name in ('B', 'C')]
    operands = gpu.Operands(*stacked, None, sliced['z'], None, True, False)
    assert operands.u.data_ptr() == sliced['u'].data_ptr() and operands.z.data_ptr() == sliced['z'].data_ptr()
    assert operands.Bx.data_ptr() == sliced['B'].data_ptr() and operands.Cx.data_ptr() == sliced['C'].data_ptr()
    assert operands.shape.PACK_B == operands.shape.PACK_C == pack
    options = dict(dt_softplus=True, backend='triton')
    assert torch.equal(selective_scan(**sliced, **options), selective_scan(**x, **options))


@slow_if_compiled
@where_it_runs
def test_channels_first_and_expanded_inputs():
    x = tensors(Case('free', L=3, D=4, both=True))
    strided = x | {
        'u': x['u'].transpose(2, 3).contiguous().transpose(2, 3),
        'A': x['A'][:1].expand(2, 4, 8),
        'D': x['D'][:, :1].expand(2, 4),
    }
    options = dict(dt_softplus=True, backend='triton')
    expected = bidirectional_selective_scan(**{name: t.contiguous() for name, t in strided.items()}, **options)
    assert torch.equal(bidirectional_selective_scan(**strided, **options), expected)


@where_it_runs
def test_offsets_past_two_to_the_31():
    x = tensors(Case('free', L=2, D=4, N=2, batch=3), torch.bfloat16)
    far = torch.empty(2**31 + 64, dtype=torch.bfloat16, device=DEVICE)  # pages that nobody touches cost nothing
    u = far.as_strided((3, 2, 4), (2**30, 4, 1))
    u.copy_(x['u'])
    options = dict(dt_softplus=True, backend='triton')
    assert torch.equal(selective_scan(**(x | {'u': u}), **options), selective_scan(**x, **options))


@slow_if_compiled
@where_it_runs
@pytest.mark.parametrize('value', [1e-6, 50.0])
def test_tiny_and_large_steps(value):
    x = tensors(Case('free', L=9, D=4, bias=False))
    x['dt'] = torch.full_like(x['dt'], value).log() if value < 1 else torch.full_like(x['dt'], value)
    options = dict(dt_softplus=True, return_last_state=True)
    wide = {name: t if t is None else t.double() for name, t in x.items()}
    for ours, plain, exact in zip(
        selective_scan(**x, **options, backend='triton'),
        selective_scan(**x, **options, backend='torch'),
        selective_scan(**wide, **options, backend='torch'),
        strict=True,
    ):
        assert cases.error(ours, exact) <= max(2 * cases.error(plain, exact), 4e-7)


@slow_if_compiled
@where_it_runs
def test_masked_and_invalid_steps():
    x = tensors(Case('free', L=6, D=4, batch=1))
    without = selective_scan(**{n: t[:, :3] if t.dim() == 3 else t for n, t in x.items()}, dt_softplus=True)
    x['dt'][:, 3:5] = -float('inf')  # a step of size zero leaves the state alone
    y, state = selective_scan(**x, dt_softplus=True, return_last_state=True, backend='triton')
    assert torch.isfinite(y).all() and torch.isfinite(state).all()
    assert cases.error(y[:, :3], without.double()) < 1e-6
    x['dt'][:, 4] = float('nan')
    y = selective_scan(**x, dt_softplus=True, backend='triton')
    assert torch.isnan(y[:, 4:]).all() and torch.isfinite(y[:, :4]).all()


@slow_if_compiled
@where_it_runs
def test_gradient_of_the_last_state_alone_and_of_few_inputs():
    case = Case('free', L=5, D=4, batch=1)
    grads = []
    for dtype, backend in ((torch.float32, 'triton'), (torch.float64, 'torch')):
        x = tensors(case, dtype)
        x['A'].requires_grad_()
        state = selective_scan(**x, dt_softplus=True, return_last_state=True, backend=backend)[1]
        grads.append(torch.autograd.grad(state.square().sum(), [x['A']])[0])
    assert cases.error(*grads) < 1e-6


@slow_if_compiled
@where_it_runs
def test_operators_are_registered_properly():
    case = Case('free', L=2, D=4, N=2)
    x = {name: t.detach().requires_grad_() for name, t in tensors(case).items()}
    lead = {name: t if name == 'z' else t.detach().unsqueeze(0) for name, t in x.items()}
    lead = {n: t.unsqueeze(3) if n in 'BC' and t.dim() == 4 else t for n, t in lead.items()}
    args = [lead[name].detach() for name in ('u', 'dt', 'A', 'B', 'C', 'D', 'z', 'dt_bias')]
    torch.library.opcheck(gpu.forward_op, (*args, True, False, 1.0, False))
    trained = [t.requires_grad_() for t in args]
    torch.library.opcheck(gpu.forward_op, (*trained, True, False, 1.0, True))
    with torch.no_grad():
        y, last, states = gpu.forward_op(*trained, True, False, 1.0, True)
        grads = gpu.backward_op(y, last, *trained, states, True, False, 1.0)
    plain = [t.detach() for t in trained]
    torch.library.opcheck(gpu.backward_op, (y, last, *plain, states, True, False, 1.0))
    assert [g.shape for g in grads] == [t.shape for t in trained]


@slow_if_compiled
@where_it_runs
def test_second_derivative_says_no():
    x = {name: t.requires_grad_() for name, t in tensors(Case('free', L=2, D=4)).items()}
    y = selective_scan(**x, dt_softplus=True, backend='triton')
    (du,) = torch.autograd.grad(y.square().sum(), [x['u']], create_graph=True)
    with pytest.raises(RuntimeError, match="backend 'triton' has no second derivative"):
        du.sum().backward()


def test_chunk_plan():
    assert gpu.plan_chunks(4096, 4000, 64) == (64, 64)  # enough programs: one chunk
    assert gpu.plan_chunks(4096, 12, 64) == (64, 1)
    block, per_chunk = gpu.plan_chunks(4096, 12, 0)
    assert per_chunk == 1 and 12 * -(-4096 // block) >= 1000
    for length in (1, 2, 31, 33, 197, 1025, 20000):
        for programs in (1, 12, 96, 383, 384, 5000):
            for fixed in (0, 64):
                block, per_chunk = gpu.plan_chunks(length, programs, fixed)
                assert block >= 1 and per_chunk >= 1 and (block == fixed or not fixed)


def test_the_table_answers_with_reasons(monkeypatch):
    def why_not(device, dtype, n):
        return TRITON.why_not(SimpleNamespace(device=torch.device(device), dtype=dtype), n)

    assert why_not('cuda', torch.bfloat16, 64) is None and why_not('xpu', torch.float32, 1) is None
    assert 'tensors are on cpu' in why_not('cpu', torch.float32, 16)
    assert 'float64' in why_not('cuda', torch.float64, 16)
    assert 'state size is 65' in why_not('cuda', torch.float32, 65)
    monkeypatch.setitem(dispatch._INSTALLED, 'triton', False)
    assert 'pip install triton' in why_not('cuda', torch.float32, 16)
    assert TRITON.load() is gpu.selective_scan_triton
