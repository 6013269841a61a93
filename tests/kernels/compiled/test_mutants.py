"""The tests of compiled kernels fail where a kernel is broken. Kernels without a barrier: see test_machine.py."""

import shutil
from dataclasses import dataclass
from pathlib import Path

import pytest

pytest.importorskip('triton')
from triton_runs import in_the_first_process, run_compiled  # noqa: E402

import ssm_kernels  # noqa: E402

HERE = Path(__file__).parent


@dataclass(frozen=True)
class Mutant:
    """What stands in a file of the package instead of what, and which row of which tests must see it."""

    label: str
    file: str
    right: str
    wrong: str
    tests: str
    row: str
    message: str

    def __str__(self) -> str:
        return self.label


NORM = 'test_add_rms_norm_triton.py'
MUTANTS = [
    Mutant(
        'wrong-sign', 'ops/add_rms_norm/gpu.py', 'b_g - b_n *', 'b_g + b_n *', NORM, 'three-tokens-D1', "'dx: error"
    ),
    Mutant(
        'mask-off-by-one',
        'ops/add_rms_norm/gpu.py',
        'm_d = o_d < D\n    m = (o_t',
        'm_d = o_d <= D\n    m = (o_t',
        NORM,
        '49-tokens-D-of-Vim',
        'norm_forward_kernel: ',
    ),
]  # fmt: skip


MARKS = [pytest.mark.compiled, pytest.mark.slow]


@in_the_first_process
@pytest.mark.parametrize('mutant', [pytest.param(m, marks=x) for m, x in zip(MUTANTS, MARKS, strict=True)], ids=str)
def test_a_broken_kernel_fails(mutant, tmp_path):
    package = tmp_path / 'ssm_kernels'
    shutil.copytree(Path(ssm_kernels.__file__).parent, package, ignore=shutil.ignore_patterns('__pycache__'))
    source = (package / mutant.file).read_text()
    assert source.count(mutant.right) == 1
    (package / mutant.file).write_text(source.replace(mutant.right, mutant.wrong))
    with pytest.raises(AssertionError) as caught:
        run_compiled(HERE.parent / mutant.tests, 90, '-k', mutant.row, marks='compiled', kernels=str(tmp_path))
    assert mutant.message in str(caught.value)
