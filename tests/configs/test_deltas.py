"""A config states only what differs: no value in it is the one that it would inherit anyway."""

import ast
import copy
import functools
from pathlib import Path

import pytest
from mmengine.config import Config, ConfigDict

import mmvim  # noqa: F401

CONFIGS = Path(__file__).parents[2] / 'configs'
NAMES = sorted(str(path.relative_to(CONFIGS)) for path in CONFIGS.rglob('*.py'))


@pytest.fixture(scope='module')
def read_base(tmp_path_factory):
    """Read what one entry of `_base_` gives, each but once."""
    folder = tmp_path_factory.mktemp('bases')

    @functools.cache
    def read(base):
        (folder / 'one.py').write_text(f'_base_ = [{base!r}]')
        return Config.fromfile(folder / 'one.py').to_dict()

    return read


def own_and_inherited(path, read_base):
    """What a config file says itself, and what its bases say together; None for a file without bases."""
    tree = ast.parse(path.read_text())
    bases = [node for node in tree.body if isinstance(node, ast.Assign) and ast.unparse(node.targets[0]) == '_base_']
    if not bases:
        return None
    named = ast.literal_eval(bases[0].value)
    named = [named] if isinstance(named, str) else named
    named = [name if '::' in name else str((path.parent / name).resolve()) for name in named]
    inherited = {key: value for name in named for key, value in read_base(name).items()}  # no two have the same key
    tree.body.remove(bases[0])
    # what the file changes in place is no longer told apart from what it inherits
    own = {'_base_': ConfigDict(copy.deepcopy(inherited))}
    exec(compile(tree, str(path), 'exec'), own)
    return {name: value for name, value in own.items() if not name.startswith('_')}, inherited


def restated(own, inherited, path=''):
    """Dotted keys of values that are inherited with the very same value."""
    found = []
    for key, value in own.items():
        place = f'{path}{key}'
        if key not in inherited:
            continue
        if isinstance(value, dict) and isinstance(inherited[key], dict):
            if not value.get('_delete_'):
                found += restated(value, inherited[key], f'{place}.')
        elif value == inherited[key]:
            found.append(place)
    return found


def test_what_is_restated_is_found():
    own = dict(a=1, b=dict(c=2, d=3), e=dict(_delete_=True, f=4), g=[5])
    assert restated(own, dict(a=1, b=dict(c=2, d=0), e=dict(f=4), g=[5])) == ['a', 'b.c', 'g']


@pytest.mark.parametrize('name', NAMES)
def test_no_config_restates_its_base(name, read_base):
    parts = own_and_inherited(CONFIGS / name, read_base)
    if parts is None:
        assert '_base_' in Path(name).parts or '_base_ =' not in (CONFIGS / name).read_text()
        return
    assert not restated(*parts)
