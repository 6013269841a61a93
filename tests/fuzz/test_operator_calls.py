"""The first random calls of tests/fuzz/run.py in every run of the tests, and what the comparison notices."""

import importlib.util
import subprocess
import sys
from pathlib import Path

import pytest
import torch

RUN = Path(__file__).with_name('run.py')
sys.path.insert(0, str(RUN.parent))

import operator_calls  # noqa: E402
from operator_calls import draw, problems  # noqa: E402

pytestmark = pytest.mark.skipif(importlib.util.find_spec('numba') is None, reason='needs numba')


def fuzz(calls):
    """In a process of its own: forks, and threads of PyTorch, would reach into those of the other tests."""
    return subprocess.run([sys.executable, '-W', 'ignore', RUN, '--calls', str(calls)], capture_output=True, text=True)


def test_a_thousand_random_calls():
    done = fuzz(1000)
    assert done.returncode == 0, done.stdout[-3000:] + done.stderr[-3000:]
    assert float(done.stdout.split('memory grew by ')[1].split()[0]) < 100


@pytest.mark.slow
def test_ten_thousand_random_calls():
    done = fuzz(10_000)
    assert done.returncode == 0, done.stdout[-3000:] + done.stderr[-3000:]
    assert float(done.stdout.split('memory grew by ')[1].split()[0]) < 100


def test_every_op_layout_and_dtype_is_drawn():
    calls = [draw(number) for number in range(400)]
    assert {call.op for call in calls} == set(operator_calls.OPS)
    assert {call.dtype for call in calls} == set(operator_calls.FLOOR)
    assert {layout.split()[0] for call in calls for layout in call.layouts.values()} == set(operator_calls.LAYOUTS)
    assert {call.autocast for call in calls} == {True, False} == {bool(call.trained) for call in calls}


@pytest.mark.parametrize('wrong', ['digits', 'nan', 'in place', 'dtype'])
def test_a_wrong_result_is_noticed(wrong, monkeypatch):
    original = operator_calls.ops.causal_conv1d

    def op(x, *args, backend=None, **options):
        y = original(x, *args, backend=backend, **options)
        if backend == 'torch':  # the reference
            return y
        if wrong == 'in place':
            x.detach().add_(1)
        return y * (1 + 1e-4) if wrong == 'digits' else y.double() if wrong == 'dtype' else y * float('nan')

    wanted = lambda c: c.op == 'causal_conv1d' and c.backend == 'numba' and c.dtype == torch.float32  # noqa: E731
    call = next(c for c in map(draw, range(1000)) if wanted(c) and not any(0 in x.shape for x in c.values.values()))
    assert not problems(call)
    monkeypatch.setattr(operator_calls.ops, 'causal_conv1d', op)
    assert len(problems(call)) >= 1
