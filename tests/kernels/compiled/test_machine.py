"""The tool itself: small kernels that do what no kernel may do are reported, a correct one is not."""

import re

import pytest
import torch

pytest.importorskip('triton')
import triton  # noqa: E402
import triton.language as tl  # noqa: E402
from triton_runs import COMPILED, in_the_first_process, run_compiled  # noqa: E402

from compiled import launches  # noqa: E402
from compiled.machine import KernelError, Machine  # noqa: E402

pytestmark = pytest.mark.compiled
in_the_second_process = pytest.mark.skipif(not COMPILED, reason='runs in the process of test_the_tool')


@in_the_first_process
def test_the_tool():
    run_compiled(__file__)


@triton.jit
def double(x, y, n, BLOCK: tl.constexpr):
    o = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    tl.store(y + o, tl.load(x + o, mask=o < n) * 2, mask=o < n)


@triton.jit
def double_past_the_end(x, y, n, BLOCK: tl.constexpr):
    o = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    tl.store(y + o, tl.load(x + o, mask=o < n) * 2, mask=o <= n)


@triton.jit
def double_from_past_the_end(x, y, n, BLOCK: tl.constexpr):
    o = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    tl.store(y + o, tl.load(x + o) * 2, mask=o < n)


@triton.jit
def all_write_the_first(x, y, n, BLOCK: tl.constexpr):
    o = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    tl.store(y + tl.arange(0, BLOCK), tl.load(x + o, mask=o < n))


@triton.jit
def read_what_the_next_writes(x, y, n, BLOCK: tl.constexpr):
    o = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    b_x = tl.load(x + o, mask=o < n)
    b_next = tl.load(y + o + BLOCK, mask=o + BLOCK < n)
    tl.store(y + o, b_x + b_next, mask=o < n)


@triton.jit(do_not_specialize=['n'])
def promise_alignment(x, y, n, BLOCK: tl.constexpr):
    o = tl.max_contiguous(tl.multiple_of(n + tl.arange(0, BLOCK), BLOCK), BLOCK)  # not true of every n
    tl.store(y + tl.arange(0, BLOCK), tl.load(x + o))


@triton.jit
def turn_round_in_place(x, y, n, BLOCK: tl.constexpr, BARRIER: tl.constexpr):
    o = tl.arange(0, BLOCK)
    tl.store(y + o, tl.load(x + o))
    if BARRIER:
        tl.debug_barrier()
    b_y = tl.load(y + BLOCK - 1 - o)
    tl.debug_barrier()
    tl.store(y + o, b_y)


@triton.jit
def total(x, y, n, BLOCK: tl.constexpr):
    o = tl.arange(0, BLOCK)
    tl.store(y, tl.sum(tl.load(x + o, mask=o < n, other=0.0), axis=0))


@triton.jit
def never_ends(x, y, n, BLOCK: tl.constexpr):
    b_x = tl.load(x)
    while b_x > 0.0:
        b_x += 1.0
    tl.store(y, b_x)


def launch(kernel, n=300, block=128, warps=4, programs=None, **options):
    x = torch.arange(1.0, n + 1)
    y = torch.full_like(x, float('nan'))
    kernel[(triton.cdiv(n, block) if programs is None else programs,)](x, y, n, block, num_warps=warps, **options)
    return x, y


@in_the_second_process
@pytest.mark.parametrize('warps', [1, 4])
def test_correct_kernels_compute(warps):
    before = launches.counted['double']
    x, y = launch(double, warps=warps)
    assert torch.equal(y, 2 * x) and launches.counted['double'] == before + 1
    x, y = launch(total, block=512, warps=warps, programs=1)
    assert y[0] == x.sum()
    x, y = launch(turn_round_in_place, n=128, warps=warps, BARRIER=True)
    assert torch.equal(y, x.flip(0))


@in_the_second_process
@pytest.mark.parametrize(
    ('kernel', 'message'),
    [
        (double_past_the_end, r'write out of bounds, at byte 1200 of y \(1200 bytes\); program 2, thread'),
        (double_from_past_the_end, r'read out of bounds, at byte 12\d\d of x \(1200 bytes\); program 2, thread'),
        (all_write_the_first, r'two programs write here, at byte 0 of y .*program 1'),
        (read_what_the_next_writes, r'a program writes what another one reads, at byte 512 of y'),
    ],
    ids=lambda x: getattr(x, '__name__', ''),
)
def test_accesses_that_no_program_may_do(kernel, message):
    with pytest.raises(KernelError, match=message) as caught:
        launch(kernel)
    assert re.match(rf'{kernel.__name__}: .*, test_machine\.py:\d+, PTX line \d+ `', str(caught.value))


@in_the_second_process
@pytest.mark.parametrize('warps', [1, 4])
def test_threads_of_a_program_need_a_barrier(warps):
    # the lanes of a warp as well: they need not run in step
    message = 'a thread reads what another thread of its program wrote, without a barrier'
    with pytest.raises(KernelError, match=message):
        launch(turn_round_in_place, n=128, warps=warps, BARRIER=False)


@in_the_second_process
def test_misaligned_access():
    x, y = torch.ones(256), torch.zeros(128)
    promise_alignment[(1,)](x, y, 128, 128, num_warps=1)
    with pytest.raises(KernelError, match='misaligned access, at byte 4 of x'):
        promise_alignment[(1,)](x, y, 1, 128, num_warps=1)


@pytest.fixture
def change_ptx(monkeypatch):
    """Has the PTX of kernels changed before it is translated."""

    real = Machine.translate

    def change(edit):
        monkeypatch.setattr(launches, 'programs', {})
        monkeypatch.setattr(Machine, 'translate', lambda self, ptx: real(self, edit(ptx)))

    return change


BARRIER = re.compile(r'^\s*bar\.sync.*$', re.M)


def without_barrier(ptx, i):
    """The PTX without the i-th of the barriers that follow a store to shared memory, or None if there are fewer."""
    spans, after = [], 0
    for store in re.finditer(r'st\.shared', ptx):
        if store.start() >= after and (barrier := BARRIER.search(ptx, store.end())):
            spans.append(barrier.span())
            after = barrier.end()
    return ptx[: spans[i][0]] + ptx[spans[i][1] :] if i < len(spans) else None


def norm_of_long_rows():
    import cases_add_rms_norm as cases

    from ssm_kernels.ops.add_rms_norm import gpu

    x, residual, weight = (t.float().requires_grad_() for t in cases.make_inputs(cases.Case('', (3,), 1025)).values())
    out, stream = gpu.add_rms_norm_triton(x, residual, weight, 1e-5, torch.float32)
    (out + stream).sum().backward()


@in_the_second_process
@pytest.mark.parametrize('run', [lambda: launch(total, block=512, programs=1), norm_of_long_rows], ids=['own', 'norm'])
def test_every_barrier_of_a_sum_over_warps_is_needed(run, change_ptx):
    most = 0
    for i in range(20):
        found = []

        def without(ptx, i=i, found=found):
            found.append(without_barrier(ptx, i))
            return found[-1] or ptx

        change_ptx(without)
        try:
            run()
        except KernelError as error:
            assert 'without a barrier between them' in str(error)
            most = i + 1
        else:
            assert not any(found), f'a kernel runs without its barrier {i} as well'
            break
    assert most > 0


@in_the_second_process
def test_what_cannot_be_translated_is_named(change_ptx):
    change_ptx(lambda ptx: ptx.replace('add.f32', 'tanh.approx.f32'))
    with pytest.raises(NotImplementedError, match=r'total, PTX line \d+ \(\S+:\d+\): cannot translate `tanh\.approx'):
        launch(total, block=512, programs=1)


@in_the_second_process
def test_threads_that_part_at_a_branch(change_ptx):
    def part(ptx):
        branch = r'\1 setp.lt.u32 %p1, %tid.x, 5; @%p1 bra away;'
        return re.sub(r'(mov\.\w+\s+%r\d+, %tid\.x;)', branch, ptx).replace('ret;', 'away: ret;')

    change_ptx(part)
    with pytest.raises(KernelError, match='part at a branch'):
        launch(double)


@in_the_second_process
def test_a_program_without_end(monkeypatch):
    monkeypatch.setattr('compiled.machine.MOST_STEPS', 10_000)
    with pytest.raises(KernelError, match='never_ends: the program does not end'):
        launch(never_ends, programs=1)


@in_the_second_process
def test_views_of_huge_memory_cost_what_is_touched():
    far = torch.empty(2**33, dtype=torch.uint8)  # pages that nobody touches cost nothing
    x = far.view(torch.float32)[2**30 : 2**30 + 300]
    x.copy_(torch.arange(300.0))
    y = torch.empty(300)
    double[(3,)](x, y, 300, 128)
    assert torch.equal(y, 2 * x)
