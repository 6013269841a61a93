"""The Triton convolutions against the float64 reference, wherever triton_runs can run it."""

# K directions, B batch, L tokens, D channels, W width

from types import SimpleNamespace

import pytest
import torch

from ssm_kernels import bidirectional_causal_conv1d, causal_conv1d, dispatch, same_conv1d

pytest.importorskip('triton')
import cases_causal_conv1d as cases  # noqa: E402
from cases_causal_conv1d import Case  # noqa: E402
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

from ssm_kernels.ops import causal_conv1d as room  # noqa: E402
from ssm_kernels.ops.causal_conv1d import gpu  # noqa: E402

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
    return put_triton_first(monkeypatch, room, gpu.causal_conv1d_triton)


def tensors(case, dtype=torch.float32, seed=0):
    return {n: x if x is None else x.to(DEVICE, dtype) for n, x in cases.make_inputs(case, seed).items()}


# the interpreter takes about 50 ms for a chunk of 16 tokens and a tile of channels, forward and backward
ROWS = (
    Case('one-token-both', L=1, D=5),
    Case('one-token-same-W3', L=1, padding='same', W=3, D=5),
    Case('two-tokens-causal', L=2, padding='causal', D=5),
    Case('two-tokens-anticausal-W3', L=2, padding='anticausal', W=3, D=5),
    Case('three-tokens-both-D-past-a-tile', L=3, D=65, batch=1),
    Case('three-tokens-same-D-past-a-wide-tile', L=3, padding='same', D=130, batch=1),
    Case('49-tokens-both-view', L=49, D=33, batch=1, view=True),
    Case('197-tokens-both', L=197, D=7, batch=1),
    Case('197-tokens-same-W3', L=197, padding='same', W=3, D=3, batch=1),
    Case('one-past-a-chunk-both-W3-no-bias', L=17, D=6, W=3, bias=False),
    Case('one-past-a-chunk-both-W2-no-activation', L=17, D=6, W=2, silu=False),
    Case('one-past-a-chunk-causal-W3-no-options', L=17, padding='causal', D=6, W=3, bias=False, silu=False),
    Case('one-past-a-chunk-causal-W2-view', L=17, padding='causal', D=6, W=2, view=True),
    Case('one-past-a-chunk-anticausal-view', L=17, padding='anticausal', D=6, view=True),
    Case('anticausal-W2-no-activation', L=18, padding='anticausal', D=6, W=2, batch=1, silu=False),
    Case('anticausal-no-bias', L=6, padding='anticausal', D=6, batch=1, bias=False),
    Case('chunk-exactly-same-W2-no-bias', L=16, padding='same', D=32, W=2, bias=False),
    Case('same-no-activation-view', L=5, padding='same', D=6, silu=False, view=True),
    Case('D1', L=20, D=1, batch=3),
)


def test_rows_cover_every_padding_width_and_option():
    for padding in ('causal', 'anticausal', 'both', 'same'):
        rows = [case for case in ROWS if case.padding == padding]
        assert {case.W for case in rows} == {2, 3, 4}
        for option in ('bias', 'silu', 'view'):
            assert {getattr(case, option) for case in rows} == {False, True}, (padding, option)


QUICK = (
    'one-token-same-W3',
    'two-tokens-causal',
    'three-tokens-both-D-past-a-tile',
    '49-tokens-both-view',
    'one-past-a-chunk-both-W2-no-activation',
    'one-past-a-chunk-causal-W3-no-options',
    'one-past-a-chunk-anticausal-view',
    'chunk-exactly-same-W2-no-bias',
    'D1',
)


@where_it_runs
@pytest.mark.parametrize('case', slow_when_compiled(ROWS, *QUICK), ids=str)
def test_float32_outputs_and_gradients(case, triton_row):
    assert cases.problems(case, 'triton') == []
    assert len(triton_row) == 1


@where_it_runs
@pytest.mark.parametrize('dtype', [torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize(
    'case', [Case('both', L=17, D=8), Case('same-W3-view', L=9, padding='same', W=3, D=5, view=True)], ids=str
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


@where_it_runs
@pytest.mark.parametrize('padding', ['both', 'same'])
def test_chunks_change_nothing_but_the_sums_over_tokens(padding, monkeypatch):
    case = Case('free', L=21, D=5, batch=1, padding=padding)
    inputs = cases.make_inputs(case)
    results = []
    for chunk in (24, 4, 16):
        monkeypatch.setattr(gpu, 'plan_chunk', lambda length, tiles, chunk=chunk: chunk)
        results.append(cases.run(case, inputs, torch.float32, 'triton'))
    for other in results[1:]:
        for name in ('y', 'dx'):
            assert torch.equal(other[name], results[0][name]), name
        for name in ('dweight', 'dbias'):
            torch.testing.assert_close(other[name], results[0][name], rtol=1e-5, atol=1e-5)


@slow_if_compiled
@where_it_runs
def test_two_runs_and_two_backwards_give_the_same_bits():
    leaves = [x.requires_grad_() for x in tensors(Case('free', L=35, D=5, batch=1)).values()]
    ys = [bidirectional_causal_conv1d(*leaves, backend='triton') for _ in range(2)]
    assert torch.equal(*ys)
    seed = torch.randn(ys[0].shape, generator=torch.Generator().manual_seed(0)).to(DEVICE)
    first, again = (torch.autograd.grad(ys[0], leaves, seed, retain_graph=True) for _ in range(2))
    other = torch.autograd.grad(ys[1], leaves, seed)
    for name, a, b, c in zip(('x', 'weight', 'bias'), first, again, other, strict=True):
        assert torch.equal(a, b) and torch.equal(a, c), name


@slow_if_compiled
@where_it_runs
def test_directions_equal_flips():
    x, weight, bias = tensors(Case('free', L=19, D=5, batch=1)).values()
    both = bidirectional_causal_conv1d(x, weight, bias, backend='triton')
    back = causal_conv1d(x, weight[1], bias[1], reverse=True, backend='triton')
    flipped = causal_conv1d(x.flip(1), weight[1], bias[1], backend='triton').flip(1)
    assert torch.equal(both[0], causal_conv1d(x, weight[0], bias[0], backend='triton'))
    assert torch.equal(both[1], back)
    torch.testing.assert_close(back, flipped, rtol=1e-6, atol=1e-6)


@slow_if_compiled
@where_it_runs
def test_views_are_read_in_place_and_other_strides_work(monkeypatch):
    x, weight, bias = tensors(Case('free', L=5, D=8)).values()
    want = bidirectional_causal_conv1d(x, weight, bias, backend='triton')
    half = torch.cat([x, x], -1)[..., :8]
    tokens_first = x.transpose(0, 1).contiguous().transpose(0, 1)
    reads, real = [], gpu._shape
    monkeypatch.setattr(gpu, '_shape', lambda t, *rest: (reads.append(t.data_ptr()), real(t, *rest))[1])
    for view in (half, tokens_first):
        assert torch.equal(bidirectional_causal_conv1d(view, weight, bias, backend='triton'), want)
    assert reads == [half.data_ptr(), tokens_first.data_ptr()]
    odd = [t.transpose(0, -1).contiguous().transpose(0, -1) for t in (x, weight, bias)]
    assert not odd[0].is_contiguous() and not odd[1].is_contiguous()
    assert torch.equal(bidirectional_causal_conv1d(*odd, backend='triton'), want)
    assert torch.equal(
        bidirectional_causal_conv1d(x, weight[..., :1].expand_as(weight), bias, backend='triton'),
        bidirectional_causal_conv1d(x, weight[..., :1].repeat(1, 1, 4), bias, backend='triton'),
    )


@where_it_runs
def test_offsets_past_two_to_the_31():
    x, weight, bias = tensors(Case('free', L=3, D=4, batch=3), torch.bfloat16).values()
    far = torch.empty(2**31 + 64, dtype=torch.bfloat16, device=DEVICE)  # pages that nobody touches cost nothing
    for strides in ((2**30, 4, 1), (4, 2**30, 1)):
        odd = far.as_strided(x.shape, strides)
        odd.copy_(x)
        want = bidirectional_causal_conv1d(x, weight, bias, backend='triton')
        assert torch.equal(bidirectional_causal_conv1d(odd, weight, bias, backend='triton'), want)


@slow_if_compiled
@where_it_runs
def test_gradient_strides_are_free():
    case = Case('free', L=5, D=6, batch=2)
    x, weight, bias = (t.requires_grad_() for t in tensors(case).values())
    y = bidirectional_causal_conv1d(x, weight, bias, backend='triton')
    dense = torch.randn(y.shape, generator=torch.Generator().manual_seed(0)).to(DEVICE)
    want = torch.autograd.grad(y, (x, weight, bias), dense, retain_graph=True)
    for odd in (dense.transpose(0, 2).contiguous().transpose(0, 2), dense.mT.contiguous().mT):
        grads = torch.autograd.grad(y, (x, weight, bias), odd, retain_graph=True)
        assert all(map(torch.equal, grads, want))
    ones = torch.autograd.grad(y, (x, weight, bias), torch.ones_like(y), retain_graph=True)
    assert all(map(torch.equal, torch.autograd.grad(y.sum(), (x, weight, bias)), ones))


@where_it_runs
def test_nan_stays_in_its_channel_and_window():
    x, weight, bias = tensors(Case('free', L=12, D=5)).values()
    x[0, 6, 2] = float('nan')
    ahead, back = bidirectional_causal_conv1d(x, weight, bias, backend='triton')
    for y, hit in ((ahead, range(6, 10)), (back, range(3, 7))):
        assert y[0, list(hit), 2].isnan().all() and y.isnan().sum() == 4


@slow_if_compiled
@where_it_runs
@pytest.mark.parametrize(('padding', 'bias'), [('both', True), ('anticausal', False)])
def test_operators_are_registered_properly(padding, bias):
    x, weight, bias = tensors(Case('free', L=2, D=4, W=3, padding=padding, bias=bias)).values()
    if padding != 'both':
        weight, bias = weight[None], None if bias is None else bias[None]
    leaves = [None if t is None else t.clone().requires_grad_() for t in (x, weight, bias)]
    torch.library.opcheck(gpu.forward_op, (*leaves, padding, True))
    y = gpu.forward_op(x, weight, bias, padding, True)
    torch.library.opcheck(gpu.backward_op, (y, x, weight, bias, padding, True))


@slow_if_compiled
@where_it_runs
def test_torch_compile_without_graph_breaks():
    leaves = [x.requires_grad_() for x in tensors(Case('free', L=5, D=6)).values()]

    def call(x, weight, bias):
        both = gpu.causal_conv1d_triton(x, weight, bias, 'both', True)
        return both.sum(0) + gpu.causal_conv1d_triton(x, weight[:1], None, 'same', False)[0]

    want, got = call(*leaves), torch.compile(call, fullgraph=True, backend='aot_eager')(*leaves)
    assert torch.equal(got, want)
    grads = [torch.autograd.grad(y.square().sum(), leaves) for y in (want, got)]
    for a, b in zip(*grads, strict=True):
        torch.testing.assert_close(a, b)


@slow_if_compiled
@where_it_runs
def test_second_derivative_says_no():
    leaves = [x.requires_grad_() for x in tensors(Case('free', L=2, D=4)).values()]
    y = bidirectional_causal_conv1d(*leaves, backend='triton')
    (dx,) = torch.autograd.grad(y.square().sum(), leaves[:1], create_graph=True)
    with pytest.raises(RuntimeError, match="backend 'triton' has no second derivative"):
        dx.sum().backward()


@where_it_runs
@skip_in_interpreter
@pytest.mark.skipif(not torch.cuda.is_available(), reason='CUDA graphs')
def test_in_a_cuda_graph():
    x, weight, bias = (t.requires_grad_() for t in tensors(Case('free', L=70, D=64)).values())

    def step():
        y = same_conv1d(x, weight[0], bias[0]) + bidirectional_causal_conv1d(x, weight, bias).sum(0)
        return (y, *torch.autograd.grad(y.sum(), (x, weight, bias)))

    side = torch.cuda.Stream()  # kernels are compiled before the capture
    side.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(side):
        want = step()
    torch.cuda.current_stream().wait_stream(side)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        got = step()
    graph.replay()
    assert all(map(torch.equal, got, want))


def test_chunk_plan():
    for tiles in (1, 6, 48, 384, 10_000):
        for length in (1, 2, 17, 197, 4096, 20_000):
            chunk = gpu.plan_chunk(length, tiles)
            assert chunk >= gpu.MIN_CHUNK and chunk % gpu.UNROLL == 0
            assert tiles * -(-length // chunk) <= max(tiles, gpu.TARGET_PROGRAMS + tiles)
    assert gpu.plan_chunk(4096, 10_000) == 4096  # enough programs: one walk
    assert gpu.plan_chunk(197, 6) == gpu.MIN_CHUNK


def test_the_table_answers_with_reasons(monkeypatch):
    def why_not(device, dtype):
        return TRITON.why_not(SimpleNamespace(device=torch.device(device), dtype=dtype), 4)

    assert why_not('cuda', torch.bfloat16) is None and why_not('xpu', torch.float32) is None
    assert 'tensors are on cpu' in why_not('cpu', torch.float32)
    assert 'float64' in why_not('cuda', torch.float64)
    monkeypatch.setitem(dispatch._INSTALLED, 'triton', False)
    assert 'pip install triton' in why_not('cuda', torch.float32)
    assert TRITON.load() is gpu.causal_conv1d_triton
