"""Where the tests of Triton kernels run: on a GPU in this process, and without one in two others.

``run_compiled`` starts a second pytest on a test file, in which every kernel runs through the PTX that Triton compiled
(see the package ``compiled``); ``run_in_interpreter`` one in which Triton's interpreter runs the kernels. Both must be
chosen before Triton is first used. There, tensors are on the CPU, and scratch memory is poisoned; on a GPU the same
tests run in the first process.
"""

from __future__ import annotations

import atexit
import functools
import os
import shutil
import subprocess
import sys
import tempfile
from collections.abc import Callable, Sequence
from pathlib import Path
from types import ModuleType

import pytest
import torch
from compiled import build

from ssm_kernels.dispatch import Backend

INTERPRETED = os.environ.get('TRITON_INTERPRET') == '1'
COMPILED = int(os.environ.get('SSM_KERNELS_COMPILED', '0'))  # compute capability of the GPU that is compiled for
DEVICE = 'cpu' if INTERPRETED or COMPILED else 'xpu' if torch.xpu.is_available() else 'cuda'
in_the_first_process = pytest.mark.skipif(bool(INTERPRETED or COMPILED), reason='starts the other processes')

skip_in_interpreter = pytest.mark.skipif(INTERPRETED, reason='takes too long in the interpreter')


# a test whose kernels the quick rows compile and run in a form of their own
slow_if_compiled = pytest.mark.slow if COMPILED else lambda test: test


def in_full(test: Callable) -> Callable:
    """Marks a test that runs all rows of a file through compiled kernels, of every GPU that is compiled for."""
    rows = [(90, 'compiled and slow'), (80, 'compiled'), (100, 'compiled')]
    return in_the_first_process(pytest.mark.slow(pytest.mark.parametrize(('capability', 'marks'), rows)(test)))


def where_it_runs(test: Callable) -> Callable:
    """Marks a test that runs on a GPU, through compiled kernels and in the interpreter."""
    if not INTERPRETED and not COMPILED:
        return pytest.mark.gpu(test)
    test = pytest.mark.usefixtures('poisoned_memory')(test)
    return pytest.mark.compiled(test) if COMPILED else test


def slow_when_compiled(rows: Sequence, *quick: str) -> list:
    """Leaves all rows but the quick ones to the slow tests where kernels are compiled: most rows compile their own."""
    assert set(quick) <= set(map(str, rows))
    return [
        pytest.param(row, marks=pytest.mark.slow) if COMPILED and str(row) not in quick else pytest.param(row)
        for row in rows
    ]


def run_in_interpreter(file: str, *options: str) -> None:
    """Runs the tests of a file in a second process, whose kernels are interpreted; fails if one fails or none ran."""
    _run(file, {'TRITON_INTERPRET': '1'}, *options)


def run_compiled(
    file: str | Path, capability: int = 90, *options: str, marks: str = 'compiled and not slow', kernels: str = ''
) -> None:
    """Runs the marked tests of a file in a second process, whose kernels run through their PTX for a GPU.

    Skips where the tools for that are missing, unless SSM_KERNELS_REQUIRE_COMPILED=1.

    Args:
        file: the test file.
        capability: ten times the compute capability that is compiled for.
        options: for pytest.
        marks: which tests; pytest's ``-m``.
        kernels: a folder to take the package ssm_kernels from.
    """
    if reason := build.why_not():
        if os.environ.get('SSM_KERNELS_REQUIRE_COMPILED') == '1':
            pytest.fail(f'compiled kernels cannot be run: {reason}')
        pytest.skip(reason)
    settings = {
        'SSM_KERNELS_COMPILED': str(capability),
        'SSM_KERNELS_FOLDER': str(_folder()),
        # ptxas accepts every kernel, but need not optimise what nobody runs: test_triton_compile.py looks at its code
        'DISABLE_PTXAS_OPT': '1',
        'TRITON_CACHE_DIR': os.environ.get('TRITON_CACHE_DIR', str(_folder() / 'triton')),
        'PYTHONPATH': os.pathsep.join(filter(None, [kernels, os.environ.get('PYTHONPATH')])),
    }
    _run(str(file), settings, '-m', marks, *options)


@functools.cache
def _folder() -> Path:
    """Where this process and those that it starts build what they need; gone when it ends."""
    if given := os.environ.get('SSM_KERNELS_FOLDER'):
        return Path(given)
    folder = tempfile.mkdtemp(prefix='ssm_kernels_')
    atexit.register(shutil.rmtree, folder, ignore_errors=True)
    return Path(folder)


def _run(file: str, settings: dict[str, str], *options: str) -> None:
    result = subprocess.run(
        [sys.executable, '-m', 'pytest', file, '-q', '--durations=5', '-p', 'no:cacheprovider', *options],
        env=os.environ | settings | {'OMP_NUM_THREADS': '1'},
        cwd=Path(__file__).parents[2],
        capture_output=True,
        text=True,
        timeout=7200,  # seconds; the slow rows take an hour on two busy cores
    )
    print(result.stdout)
    assert result.returncode == 0, result.stdout + result.stderr
    assert ' passed' in result.stdout and ' failed' not in result.stdout


def put_triton_first(monkeypatch: pytest.MonkeyPatch, room: ModuleType, function, why_not=None) -> list:
    """Gives a room's table a row for Triton that takes tensors on the CPU as well; returns the list of its calls.

    Args:
        room: package of the op, with ``BACKENDS``.
        function: the room's Triton backend; its tensors are moved to the device, its results back.
        why_not: what the row answers; by default it takes everything.
    """
    calls = []

    def run(*args):
        calls.append(args[0].shape)
        results = function(*(x.to(DEVICE) if isinstance(x, torch.Tensor) else x for x in args))
        if isinstance(results, torch.Tensor):
            return results.to(args[0].device)
        return tuple(x.to(args[0].device) for x in results)

    row = Backend('triton', why_not or (lambda x, n: None), lambda: run)
    monkeypatch.setattr(room, 'BACKENDS', (row, *(b for b in room.BACKENDS if b.name != 'triton')))
    return calls


def poison(monkeypatch: pytest.MonkeyPatch, *modules: ModuleType) -> None:
    """Makes the modules' scratch memory and results start as NaN."""
    for module in modules:
        monkeypatch.setattr(
            module, 'empty', lambda shape, dtype, like: torch.full(shape, float('nan'), dtype=dtype, device=like.device)
        )


def _repair_interpreter() -> None:
    from triton.runtime import interpreter

    # Triton 3.9 patches its language modules anew at every call of a helper: 3/4 of the time; once a launch is enough
    patched = set()
    launch = interpreter.GridExecutor.__call__
    trunc = interpreter.InterpreterBuilder.create_fp_trunc

    def call(self, *args, **kwargs):
        if id(self.fn.__globals__) not in patched:
            interpreter._patch_lang(self.fn)
            patched.add(id(self.fn.__globals__))
        return self.rewrite()(*args, **kwargs)

    def launch_once(self, *args, **kwargs):
        patched.clear()
        return launch(self, *args, **kwargs)

    def round_to_bfloat16(self, src, dst_type):
        # the interpreter cuts off the lower bits, hardware rounds
        if dst_type.scalar.name == 'bf16':
            half = torch.from_numpy(src.data.copy()).bfloat16().view(torch.int16).numpy()
            return interpreter.TensorHandle(half.view('uint16'), dst_type.scalar)
        return trunc(self, src, dst_type)

    interpreter.InterpretedFunction.__call__ = call
    interpreter.GridExecutor.__call__ = launch_once
    interpreter.InterpreterBuilder.create_fp_trunc = round_to_bfloat16


def _run_through_ptx() -> None:
    from compiled import launches

    from ssm_kernels import triton_utils

    launches.install(COMPILED, _folder())
    triton_utils.fast_math = lambda x: True  # as for tensors on the GPU; bound before the kernels' modules import it


if INTERPRETED:
    _repair_interpreter()
if COMPILED:
    _run_through_ptx()
