"""The Triton RMSNorm against the float64 reference, wherever triton_runs can run it."""

# T tokens, D channels

from types import SimpleNamespace

import pytest
import torch

from ssm_kernels import add_rms_norm, dispatch

pytest.importorskip('triton')
import cases_add_rms_norm as cases  # noqa: E402
from cases_add_rms_norm import Case  # noqa: E402
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

from ssm_kernels.ops import add_rms_norm as room  # noqa: E402
from ssm_kernels.ops.add_rms_norm import gpu  # noqa: E402

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
    return put_triton_first(monkeypatch, room, gpu.add_rms_norm_triton)


def tensors(dtype=torch.float32, seed=0, **sizes):
    """x, residual, weight; x in dtype, the others in float32."""
    case = Case('free', **({'tokens': (2, 9), 'D': 20} | sizes))
    inputs = cases.make_inputs(case, seed)
    return [None if x is None else x.to(DEVICE, dtype if name == 'x' else torch.float32) for name, x in inputs.items()]


@where_it_runs
@pytest.mark.parametrize('case', cases.CASES, ids=str)
def test_float32_outputs_and_gradients(case, triton_row):
    assert cases.problems(case, 'triton') == []
    assert len(triton_row) == 1


@where_it_runs
@pytest.mark.parametrize('dtype', [torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize(
    'case', slow_when_compiled(cases.CASES, 'two-tokens-start', '49-tokens-D-of-Vim', 'out-alone', 'view'), ids=str
)
def test_low_precision_outputs_and_gradients(case, dtype, triton_row):
    assert cases.problems(case, 'triton', dtype) == []
    assert len(triton_row) == 1


@where_it_runs
@pytest.mark.parametrize('D', [24, 1025, 8192])
def test_tokens_around_a_tile(D):
    tile = gpu._tile(D, gpu.BACKWARD_TILE)[0]
    for tokens in {max(1, tile - 1), tile, tile + 1, gpu._tile(D, gpu.FORWARD_TILE)[0] + 1}:
        assert cases.problems(Case('free', tokens=(tokens,), D=D), 'triton') == []


@where_it_runs
@pytest.mark.parametrize('added', [True, False])
def test_programs_that_loop_over_several_tiles(added, monkeypatch):
    case = Case('free', tokens=(300,), D=33, added=added)
    inputs = cases.make_inputs(case)
    want = cases.run(case, inputs, torch.float32, 'triton')
    monkeypatch.setattr(gpu, 'MAX_BACKWARD_PROGRAMS', 3)
    got = cases.run(case, inputs, torch.float32, 'triton')
    for name, x in got.items():
        if name == 'dweight':
            torch.testing.assert_close(x, want[name], rtol=1e-5, atol=1e-5)
        else:
            assert torch.equal(x, want[name]), name
    assert cases.problems(case, 'triton') == []


@slow_if_compiled
@where_it_runs
@pytest.mark.parametrize('added', [True, False])
def test_two_runs_and_two_backwards_give_the_same_bits(added):
    inputs = tensors(tokens=(150,), D=33, added=added)
    leaves, results = [x.requires_grad_() for x in inputs if x is not None], []
    for _ in range(2):
        ends = add_rms_norm(*inputs, backend='triton')
        seeds = [torch.ones_like(x) for x in ends]
        for _ in range(2):
            results.append((*ends, *torch.autograd.grad(ends, leaves, seeds, retain_graph=True)))
    for other in results[1:]:
        assert all(map(torch.equal, results[0], other))


@where_it_runs
def test_memory_kept_for_backward_is_one_number_a_token():
    x, residual, weight = (t.requires_grad_() for t in tensors(torch.bfloat16))
    kept = []
    with torch.autograd.graph.saved_tensors_hooks(lambda t: (kept.append(t), t)[1], lambda t: t):
        _, stream = add_rms_norm(x, residual, weight, backend='triton')
    extra = [t for t in kept if t.data_ptr() not in (stream.data_ptr(), weight.data_ptr())]
    assert [t.shape for t in extra] == [(18,)]


@where_it_runs
def test_a_float32_start_is_the_stream_itself():
    x, _, weight = tensors(added=False)
    _, stream = add_rms_norm(x, None, weight, backend='triton')
    assert stream.data_ptr() == x.data_ptr()


@where_it_runs
@pytest.mark.parametrize('dtype', [torch.float32, torch.bfloat16], ids=str)
def test_a_chain_of_blocks(dtype):
    """The stream of one call goes into the next, as in a backbone; its gradient comes from both of its users."""
    inputs = cases.make_inputs(Case('free', tokens=(2, 5), D=20, added=False))
    grads = []
    for kind, name in ((torch.float64, 'torch'), (dtype, 'torch'), (dtype, 'triton')):
        wide = torch.float64 if kind == torch.float64 else torch.float32
        leaves = [inputs['x'].to(DEVICE, kind).requires_grad_(), inputs['weight'].to(DEVICE, wide).requires_grad_()]
        hidden, stream = leaves[0], None
        for _ in range(4):
            out, stream = add_rms_norm(hidden, stream, leaves[1], backend=name)
            hidden = out.tanh()
        loss = (hidden.to(wide) + stream).square().sum()
        grads.append(dict(zip(('x', 'weight'), torch.autograd.grad(loss, leaves), strict=True)))
    exact, plain, ours = grads
    assert cases.deviations(ours, plain, exact) == []


@slow_if_compiled
@where_it_runs
def test_strided_rows_are_read_in_place_and_other_strides_work():
    x, residual, weight = tensors(tokens=(6,), D=8)
    want = add_rms_norm(x, residual, weight, backend='triton')
    halves = [torch.cat([t, t], -1)[:, :8] for t in (x, residual)]
    assert all(map(torch.equal, add_rms_norm(*halves, weight, backend='triton'), want))
    odd = [t.mT.contiguous().mT for t in (x, residual)]
    twice = torch.stack([weight, weight], -1)[:, 1]
    assert all(map(torch.equal, add_rms_norm(*odd, twice, backend='triton'), want))


@where_it_runs
def test_offsets_past_two_to_the_31():
    x, _, weight = tensors(torch.bfloat16, tokens=(3,), D=4, added=False)
    far = torch.empty(2**31 + 64, dtype=torch.bfloat16, device=DEVICE)  # pages that nobody touches cost nothing
    odd = far.as_strided((3, 4), (2**30, 1))
    odd.copy_(x)
    want = add_rms_norm(x, None, weight, backend='triton')
    assert all(map(torch.equal, add_rms_norm(odd, None, weight, backend='triton'), want))


@slow_if_compiled
@where_it_runs
@pytest.mark.parametrize('added', [True, False])
@pytest.mark.parametrize('dtype', [torch.float32, torch.bfloat16], ids=str)
def test_operators_are_registered_properly(added, dtype):
    args = tensors(dtype, tokens=(3,), D=5, added=added)
    leaves = [None if t is None else t.clone().requires_grad_() for t in args]
    torch.library.opcheck(gpu.forward_op, (*leaves, 1e-5, dtype))
    out, stream, rstd = gpu.forward_op(*args, 1e-5, dtype)
    stream = stream if stream.numel() else args[0]
    for dstream in (stream, None):
        torch.library.opcheck(gpu.backward_op, (out, dstream, stream, rstd, args[2], dtype, added))


@slow_if_compiled
@where_it_runs
def test_torch_compile_without_graph_breaks():
    leaves = [x.requires_grad_() for x in tensors(tokens=(6,), D=8)]

    def call(x, residual, weight):
        hidden, stream = gpu.add_rms_norm_triton(x, None, weight, 1e-5, torch.float32)
        out, stream = gpu.add_rms_norm_triton(hidden.tanh(), stream + residual, weight, 1e-5, torch.float32)
        return out + stream

    want, got = call(*leaves), torch.compile(call, fullgraph=True, backend='aot_eager')(*leaves)
    torch.testing.assert_close(got, want)
    grads = [torch.autograd.grad(y.square().sum(), leaves) for y in (want, got)]
    for a, b in zip(*grads, strict=True):
        torch.testing.assert_close(a, b)


@slow_if_compiled
@where_it_runs
def test_second_derivative_says_no():
    leaves = [x.requires_grad_() for x in tensors()]
    out, _ = add_rms_norm(*leaves, backend='triton')
    (dx,) = torch.autograd.grad(out.square().sum(), leaves[:1], create_graph=True)
    with pytest.raises(RuntimeError, match="backend 'triton' has no second derivative"):
        dx.sum().backward()


@where_it_runs
def test_autocast_narrows_the_output_alone():
    x, residual, weight = tensors()
    want, stream = add_rms_norm(x, residual, weight, backend='triton')
    with torch.autocast(DEVICE, dtype=torch.bfloat16):
        out, new = add_rms_norm(x, residual, weight, backend='triton')
    assert torch.equal(out, want.bfloat16()) and torch.equal(new, stream)


@where_it_runs
@skip_in_interpreter
@pytest.mark.skipif(not torch.cuda.is_available(), reason='CUDA graphs')
def test_in_a_cuda_graph():
    leaves = [t.requires_grad_() for t in tensors(tokens=(70,), D=192)]

    def step():
        out, stream = add_rms_norm(*leaves)
        return (out, stream, *torch.autograd.grad(out.sum() + stream.sum(), leaves))

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


def test_the_table_answers_with_reasons(monkeypatch):
    def why_not(device, dtype, dim=192):
        return TRITON.why_not(SimpleNamespace(device=torch.device(device), dtype=dtype), dim)

    assert why_not('cuda', torch.bfloat16) is None and why_not('xpu', torch.float32, room.MAX_TRITON_DIM) is None
    assert 'tensors are on cpu' in why_not('cpu', torch.float32)
    assert 'float64' in why_not('cuda', torch.float64)
    assert 'rows have 8193 channels; the kernel takes up to 8192' in why_not('cuda', torch.float32, 8193)
    monkeypatch.setitem(dispatch._INSTALLED, 'triton', False)
    assert 'pip install triton' in why_not('cuda', torch.float32)
    assert TRITON.load() is gpu.add_rms_norm_triton
