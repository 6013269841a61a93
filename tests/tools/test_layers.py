"""Imports between packages go one way: tools -> engine -> config -> the rest."""

import ast
from pathlib import Path

import pytest

PACKAGE = Path(__file__).parents[2] / 'mmvim'
LAYERS = ('tools', 'engine', 'config')  # each may import those behind it


def imported(path):
    """Packages of mmvim that a file imports, also inside functions."""
    for node in ast.walk(ast.parse(path.read_text())):
        names = [alias.name for alias in node.names] if isinstance(node, ast.Import) else []
        names += [f'{node.module}.{alias.name}' for alias in node.names] if isinstance(node, ast.ImportFrom) else []
        yield from (name.split('.')[1] for name in names if name.startswith('mmvim.'))


@pytest.mark.parametrize('path', sorted(PACKAGE.rglob('*.py')), ids=lambda path: str(path.relative_to(PACKAGE)))
def test_no_import_goes_up(path):
    own = path.relative_to(PACKAGE).parts[0]
    above = LAYERS[: LAYERS.index(own)] if own in LAYERS else LAYERS
    assert not set(above) & set(imported(path))
