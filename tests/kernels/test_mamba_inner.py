"""Everything between a mixer's projections: the fused CPU kernel and the composition against float64."""

# K directions (1 or 2), B batch, L tokens, D channels, N state size, R rank of dt, W width

import dataclasses

import pytest
import torch

from ssm_kernels import DirectionWeights, mamba_inner

pytest.importorskip('numba')
from ssm_kernels import cpu_threads  # noqa: E402
from ssm_kernels.ops.mamba_inner import cpu, cpu_kernel  # noqa: E402


@dataclasses.dataclass(frozen=True)
class Row:
    label: str
    L: int
    D: int = 40
    N: int = 16
    R: int = 3
    W: int = 4
    K: int = 2
    batch: int = 2
    padding: str = 'causal'
    reverse: bool = False
    gate: bool = True
    without: tuple[str, ...] = ()
    scale: float = 1.0
    step: float = -1.0  # about the value of delta before softplus

    def __str__(self):
        return self.label


ROWS = (
    Row('one-token', L=1, D=5, N=8, R=1),
    Row('two-tokens-W2', L=2, D=33, N=4, R=2, W=2),
    Row('three-tokens-W3-reverse', L=3, K=1, W=3, reverse=True),
    Row('49-tokens-same-padding', L=49, D=24, N=8, R=5, W=3, K=1, padding='same', gate=False),
    Row('same-padding-W4', L=70, W=4, K=1, padding='same'),
    Row('same-padding-W2', L=66, W=2, K=1, padding='same', scale=2.0),
    Row('197-tokens-vim', L=197, D=96, R=12, scale=0.5, batch=1),
    Row('one-past-a-chunk-D-past-a-tile', L=65, D=17, scale=0.5),
    Row('one-past-two-chunks-one-direction', L=129, D=100, K=1, N=17, R=7),
    Row('D-past-a-slab', L=70, D=225, N=2),
    Row('nothing-optional', L=67, gate=False, without=('conv_bias', 'D', 'dt_bias')),
    Row('no-dt-bias', L=50, without=('dt_bias',)),
    Row('large-steps', L=130, D=24, step=60.0),  # decay below 2^-126
    Row('small-steps', L=130, D=24, step=-14.0),
)


def inputs(row, dtype=torch.float64, seed=0):
    """x and z are halves of one tensor, as in_proj makes them; values are exact in bfloat16."""
    generator = torch.Generator().manual_seed(seed)

    def draw(*shape, factor=1.0, shift=0.0):
        return (torch.randn(*shape, generator=generator) * factor + shift).bfloat16().to(dtype)

    x, z = draw(row.batch, row.L, 2 * row.D).chunk(2, dim=-1)
    weights = []
    for _ in range(row.K):
        w = DirectionWeights(
            conv_weight=draw(row.D, row.W, factor=0.5),
            conv_bias=draw(row.D, factor=0.5),
            x_proj=draw(row.R + 2 * row.N, row.D, factor=row.D**-0.5),
            dt_proj=draw(row.D, row.R, factor=row.R**-0.5),
            A=-draw(row.D, row.N).exp().bfloat16().to(dtype),
            D=draw(row.D),
            dt_bias=draw(row.D, shift=row.step),
        )
        weights.append(w._replace(**dict.fromkeys(row.without)))
    return x, z if row.gate else None, weights


def cast(weights, dtype):
    return [DirectionWeights(*(None if t is None else t.to(dtype) for t in w)) for w in weights]


def run(row, dtype, backend, seed=0, weight_dtype=None):
    x, z, weights = inputs(row, seed=seed)
    x, z = x.to(dtype), None if z is None else z.to(dtype)
    weights = cast(weights, weight_dtype or dtype)
    options = dict(scale=row.scale, reverse=row.reverse, padding=row.padding, backend=backend)
    return mamba_inner(x, z, weights, **options)


@pytest.fixture(autouse=True)
def poisoned_memory(monkeypatch):
    for module, name in ((cpu, 'empty'), (cpu_threads, 'scratch')):
        monkeypatch.setattr(module, name, lambda *shape: torch.full(shape, float('nan'), dtype=torch.float32))


@pytest.fixture
def ran(monkeypatch):
    """Names of the fused workers that ran."""
    names, real = [], cpu_threads.Worker.__call__

    def call(self, *args):
        names.extend(name for name in ('project', 'scan') if self is getattr(cpu_kernel, name))
        return real(self, *args)

    monkeypatch.setattr(cpu_threads.Worker, '__call__', call)
    return names


def error(y, exact):
    return ((y.double() - exact).abs().max() / exact.abs().max()).item()


@pytest.mark.parametrize('row', ROWS, ids=str)
def test_fused_float32(row, ran):
    with torch.no_grad():
        exact = run(row, torch.float64, 'torch')
        plain = run(row, torch.float32, 'torch')
        ours = run(row, torch.float32, 'numba')
    assert ran == ['project', 'scan']
    assert error(ours, exact) <= max(2 * error(plain, exact), 1e-6)


@pytest.mark.parametrize('dtype', [torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize('label', ['197-tokens-vim', 'same-padding-W4'])
def test_fused_low_precision(label, dtype, ran):
    row = next(r for r in ROWS if r.label == label)
    with torch.no_grad():
        exact = run(row, torch.float64, 'torch')
        plain = run(row, dtype, 'torch')
        ours = run(row, dtype, 'numba')
    assert ran == ['project', 'scan']
    assert ours.dtype == dtype
    assert error(ours, exact) <= 2 * error(plain, exact)


def test_ten_seeds():
    row = ROWS[6]
    with torch.no_grad():
        for seed in range(10):
            exact = run(row, torch.float64, 'torch', seed)
            assert error(run(row, torch.float32, 'numba', seed), exact) <= max(
                2 * error(run(row, torch.float32, 'torch', seed), exact), 1e-6
            )


@pytest.mark.parametrize('label', ['197-tokens-vim', '49-tokens-same-padding', 'three-tokens-W3-reverse'])
def test_gradients_of_the_composition(label, ran):
    row = next(r for r in ROWS if r.label == label)

    def gradients(dtype, backend):
        x, z, weights = inputs(row)
        x, z = x.to(dtype), None if z is None else z.to(dtype)
        leaves = [t.requires_grad_() for t in (x, z) if t is not None]
        weights = cast(weights, dtype)
        leaves += [t.requires_grad_() for w in weights for t in w if t is not None]
        options = dict(scale=row.scale, reverse=row.reverse, padding=row.padding, backend=backend)
        y = mamba_inner(x, z, weights, **options)
        dy = torch.randn(y.shape, generator=torch.Generator().manual_seed(1)).bfloat16().to(dtype)
        return [y, *torch.autograd.grad(y, leaves, dy)]

    exact, plain, ours = (
        gradients(torch.float64, 'torch'),
        gradients(torch.float32, 'torch'),
        gradients(torch.float32, None),
    )
    assert ran == []
    for e, p, o in zip(exact, plain, ours, strict=True):
        assert error(o, e) <= max(2 * error(p, e), 1e-6)


def test_fused_only_where_no_gradient_is_needed(ran):
    x, z, weights = inputs(ROWS[6], torch.float32)
    mamba_inner(x, z, weights)
    assert ran == ['project', 'scan']
    weights[1].A.requires_grad_()
    y = mamba_inner(x, z, weights)
    assert ran == ['project', 'scan'] and y.requires_grad
    with torch.no_grad():
        torch.testing.assert_close(mamba_inner(x, z, weights), y.detach(), rtol=1e-4, atol=1e-5)
    assert ran == ['project', 'scan'] * 2


def test_equal_bits_for_any_number_of_threads():
    x, z, weights = inputs(Row('many', L=300, D=200), torch.float32)
    before = torch.get_num_threads()
    try:
        results = []
        for threads in (1, 2, 3):
            torch.set_num_threads(threads)
            results.append(mamba_inner(x, z, weights))
    finally:
        torch.set_num_threads(before)
    assert torch.equal(results[0], results[1]) and torch.equal(results[0], results[2])


def test_non_contiguous_inputs():
    x, z, weights = inputs(ROWS[6], torch.float32)
    turned = x.mT.contiguous().mT
    assert turned.stride(-1) != 1
    w = weights[0]
    strided = w._replace(x_proj=w.x_proj.T.contiguous().T, conv_weight=w.conv_weight.flip(1).flip(1).T.contiguous().T)
    assert torch.equal(mamba_inner(turned, z, [strided, weights[1]]), mamba_inner(x, z, weights))


def test_autocast(ran):
    x, z, weights = inputs(ROWS[6], torch.float32)
    with torch.autocast('cpu', dtype=torch.bfloat16), torch.no_grad():
        y = mamba_inner(x, z, weights)
        low = mamba_inner(x.bfloat16(), z, weights)
    assert y.dtype == torch.bfloat16 and torch.equal(y, low) and len(ran) == 4
    exact = mamba_inner(x.double(), z.double(), cast(weights, torch.float64), backend='torch')
    assert error(y, exact) < 2**-8


def test_operator_contract():
    x, z, weights = inputs(Row('small', L=5, D=6, N=2, R=1, batch=1), torch.float32)
    flat = [t for w in weights for t in w]
    torch.library.opcheck(cpu.forward_op, (x, z, flat, 0.5, False, False))
    torch.library.opcheck(cpu.forward_op, (x, None, [flat[0], x.new_empty(0), *flat[2:7]], 1.0, True, False))


def test_compiled_whole():
    x, z, weights = inputs(ROWS[6], torch.float32)

    @torch.compile(fullgraph=True, backend='aot_eager', dynamic=True)
    def call(x, z):
        return mamba_inner(x, z, weights, scale=0.5)

    with torch.no_grad():
        for length in (197, 60):
            want = mamba_inner(x[:, :length], z[:, :length], weights, scale=0.5)
            assert torch.equal(call(x[:, :length], z[:, :length]), want)


def test_traced():
    x, z, weights = inputs(ROWS[6], torch.float32)
    weights = [w._replace(D=None) for w in weights]
    with torch.no_grad():
        traced = torch.jit.trace(lambda x, z: mamba_inner(x, z, weights), (x, z))
        for length in (197, 60):
            torch.testing.assert_close(
                traced(x[:, :length], z[:, :length]), mamba_inner(x[:, :length], z[:, :length], weights)
            )


GOOD = inputs(Row('good', L=4, D=6, N=3, R=2, batch=1), torch.float32)


def broken(**changes):
    return [GOOD[2][0], GOOD[2][1]._replace(**changes)]


@pytest.mark.parametrize(
    ('arguments', 'message'),
    [
        (dict(x=GOOD[0][0]), r'x has shape \(4, 6\), must be \(B, L, D\)'),
        (dict(x=GOOD[0].long()), 'x has dtype torch.int64'),
        (dict(x=GOOD[0][:, :0]), 'every size must be at least 1'),
        (dict(z=GOOD[1][:, :3]), r'z has shape \(1, 3, 6\), must equal that of x, \(1, 4, 6\)'),
        (dict(z=GOOD[1].double()), 'z has dtype torch.float64, x has torch.float32'),
        (dict(z=GOOD[1].to('meta')), 'z is on meta, x is on cpu'),
        (dict(weights=[]), 'weights has 0 directions, must have 1 or 2'),
        (dict(weights=GOOD[2] * 2), 'weights has 4 directions'),
        (dict(reverse=True), 'reverse is for one direction, weights has 2'),
        (dict(padding='same'), 'padding is for one direction, weights has 2'),
        (dict(padding='valid'), "padding must be 'causal' or 'same', got 'valid'"),
        (dict(weights=GOOD[2][:1], padding='same', reverse=True), "reverse is for padding='causal'"),
        (
            dict(weights=broken(conv_weight=torch.ones(6, 5))),
            r'weights\[1\].conv_weight has shape \(6, 5\), must be \(6, 4\)',
        ),
        (dict(weights=broken(A=torch.ones(6, 4))), r'weights\[1\].A has shape \(6, 4\), must be \(6, 3\)'),
        (dict(weights=broken(dt_proj=None)), r'weights\[1\].dt_proj must be a tensor, got NoneType'),
        (dict(weights=broken(D=torch.ones(5))), r'weights\[1\].D has shape \(5,\), must be \(6,\)'),
        (dict(weights=broken(x_proj=torch.ones(7, 6))), r'weights\[1\].x_proj has shape \(7, 6\), must be \(8, 6\)'),
        (dict(weights=[GOOD[2][0]._replace(conv_weight=torch.ones(6, 1))]), 'W from 2 to 4'),
        (dict(backend='cuda'), "unknown backend 'cuda'"),
    ],
)
def test_bad_arguments(arguments, message):
    values = dict(zip(('x', 'z', 'weights'), GOOD, strict=True)) | arguments
    with pytest.raises(ValueError, match=f'mamba_inner: .*{message}'):
        mamba_inner(**values)


def test_forced_backend_answers_with_its_reason():
    x, z, weights = inputs(ROWS[0])
    with pytest.raises(RuntimeError, match="backend 'numba' cannot run this: the kernel computes in float32"):
        mamba_inner(x, z, weights, backend='numba')
    with pytest.raises(RuntimeError, match="backend 'triton' cannot run this: tensors are on cpu"):
        mamba_inner(x, z, weights, backend='triton')
