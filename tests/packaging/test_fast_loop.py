""".ci/fast: every row belongs to files that exist and leads to tests that exist."""

from importlib.machinery import SourceFileLoader
from importlib.util import module_from_spec, spec_from_loader
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
loader = SourceFileLoader('fast', str(ROOT / '.ci' / 'fast'))
fast = module_from_spec(spec_from_loader('fast', loader))
loader.exec_module(fast)
FILES = [
    str(file.relative_to(ROOT))
    for folder in ('kernels', 'mmvim', 'tools', 'configs', 'docs', 'tests/kernels/compiled')
    for file in (ROOT / folder).rglob('*')
    if file.is_file() and not {'__pycache__', '.mim', '_build'} & set(file.parts)
] + ['setup.py', 'pyproject.toml', 'README.md']


@pytest.mark.parametrize('start', [row[0] for row in fast.TESTS])
def test_a_row_belongs_to_a_file_with_tests(start):
    first = [next(row[0] for row in fast.TESTS if file.startswith(row[0])) for file in FILES if file.startswith(start)]
    assert start in first, 'no file begins so, or an earlier row has them all'
    assert any(fast.tests_of(file) for file in FILES if file.startswith(start))


def test_only_benchmark_results_and_texts_have_no_tests():
    without = {file for file in FILES if not fast.tests_of(file)}
    assert not {file for file in without if file.endswith('.py')} - {'mmvim/models/backbones/__init__.py'}
    assert fast.tests_of('tests/models/test_hier_vim.py') == ['tests/models/test_hier_vim.py']
    assert fast.tests_of('tests/models/conftest.py') == []
