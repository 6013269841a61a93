"""What the files of a config say, which the values that come out of them do not show."""

import ast
import os
import re
from collections.abc import Iterable
from copy import deepcopy
from functools import cache
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import NamedTuple

import yaml
from mmengine.config import Config

from mmvim.compat.lookup import HOSTS

PLACEHOLDER = re.compile(r'\{\{.*?\}\}')  # mmengine's, such as {{_base_.data_root}}
BASE_READ = re.compile(r'\b_base_(?:\.|\[[\'"])(\w+)')
DATA_FORMATS = ('.yml', '.yaml', '.json')
OWN_SCOPES = (
    ast.FunctionDef, ast.AsyncFunctionDef, ast.ClassDef, ast.Lambda,
    ast.ListComp, ast.SetComp, ast.DictComp, ast.GeneratorExp,
)  # fmt: skip
SPLIT_KEYS = ('dataloader', 'evaluator')


class ConfigFile(NamedTuple):
    """One file of a config.

    Attributes:
        path: the file.
        bases: files of its ``_base_``.
        assigned: its top-level keys, and the line that sets each.
        copies: keys that are set to what another key of the file is, and that key.
        read: names that the file uses itself.
        base_read: keys of its bases that it uses by ``_base_.KEY``.
        is_child: whether it inherits.
        is_hosts: whether it belongs to the configs of a host and inherits nothing of mmvim's.
    """

    path: str
    bases: list[str]
    assigned: dict[str, int]
    copies: dict[str, str]
    read: set[str]
    base_read: set[str]
    is_child: bool
    is_hosts: bool


def config_files(path: str | None) -> list[ConfigFile]:
    """A config file, in Python, YAML or JSON, and all that it inherits from, bases first; none of other files."""
    if not path or not path.endswith(('.py', *DATA_FORMATS)) or not os.path.isfile(path):
        return []
    text = Path(path).read_text(encoding='utf-8')
    assigned, copies, read = _data_keys(text) if path.endswith(DATA_FORMATS) else _python_keys(text)
    bases = _base_files(path) if '_base_' in assigned else []
    inherited = [file for base in bases for file in config_files(base)]
    own = ConfigFile(
        path=path,
        bases=bases,
        assigned={name: line for name, line in assigned.items() if not name.startswith('_')},
        copies=copies,
        read=read,
        base_read=set(BASE_READ.findall(text)),
        is_child=bool(bases) or (path.endswith('.py') and 'read_base' in text),
        is_hosts=_is_hosts(path, inherited),
    )
    return [*inherited, own]


def _python_keys(text: str) -> tuple[dict[str, int], dict[str, str], set[str]]:
    """Names that a Python config sets and the line of each, those that copy another and which, and names it uses."""
    tree = ast.parse(PLACEHOLDER.sub('None', text))
    assigned, copies = {}, {}
    for node in _module_scope(tree):
        if isinstance(node, ast.Name) and isinstance(node.ctx, ast.Store):
            assigned[node.id] = node.lineno
        if not isinstance(node, ast.Assign | ast.AnnAssign):
            continue
        targets = node.targets if isinstance(node, ast.Assign) else [node.target]
        names = [n.id for t in targets for n in ast.walk(t) if isinstance(n, ast.Name) and isinstance(n.ctx, ast.Store)]
        if isinstance(node.value, ast.Name):
            copies.update(dict.fromkeys(names, node.value.id))
        elif len(targets) > 1:  # a = b = dict(...)
            copies.update({name: names[i - 1] for i, name in enumerate(names)})
    read = {n.id for n in ast.walk(tree) if isinstance(n, ast.Name) and not isinstance(n.ctx, ast.Store)}
    loops = [node.target for node in ast.walk(tree) if isinstance(node, ast.For)]  # a counter may count only
    read |= {n.id for target in loops for n in ast.walk(target) if isinstance(n, ast.Name)}
    return assigned, copies, read


def _module_scope(node: ast.AST) -> Iterable[ast.AST]:
    for child in ast.iter_child_nodes(node):
        if not isinstance(child, OWN_SCOPES):
            yield child
            yield from _module_scope(child)


def _data_keys(text: str) -> tuple[dict[str, int], dict[str, str], set[str]]:
    """As :func:`_python_keys` of YAML, of which JSON is a part: there a key is used by an alias of its anchor."""
    tree = yaml.compose(PLACEHOLDER.sub('null', text).replace('\t', ' '), Loader=yaml.SafeLoader)
    assigned, copies, read, held = {}, {}, set(), {}
    for key, value in tree.value if isinstance(tree, yaml.MappingNode) else []:
        if key.tag == 'tag:yaml.org,2002:merge':
            read |= set(held.values())
            continue
        assigned[key.value] = key.start_mark.line + 1
        if id(value) in held:
            copies[key.value] = held[id(value)]
        nodes = set(_nodes(value))
        read |= {held[node] for node in nodes & held.keys()}
        held.update(dict.fromkeys(nodes - held.keys(), key.value))
    return assigned, copies, read


def _nodes(node: yaml.Node) -> Iterable[int]:
    yield id(node)
    if isinstance(node, yaml.CollectionNode):
        for child in node.value:
            for part in child if isinstance(child, tuple) else (child,):
                yield from _nodes(part)


def _base_files(path: str) -> list[str]:
    with TemporaryDirectory() as folder:
        filled = os.path.join(folder, os.path.basename(path))
        Config._substitute_predefined_vars(path, filled)
        Config._pre_substitute_base_vars(filled, filled)
        return [Config._get_cfg_path(base, path)[0] for base in Config._get_base_files(filled)]


@cache
def _package(path: str) -> str | None:
    """Host, or mmvim, whose package a file is in, or whose checkout: index and package lie above it."""
    return next(
        (
            name
            for parent in Path(os.path.abspath(path)).parents
            for name in ('mmvim', *HOSTS)
            if (parent.name == name and (parent / '__init__.py').is_file())
            or ((parent / 'model-index.yml').is_file() and (parent / name / '__init__.py').is_file())
        ),
        None,
    )


def _is_hosts(path: str, inherited: Iterable[ConfigFile]) -> bool:
    """Whether a config belongs to a host: one with a base of mmvim's is someone's own, wherever it is kept."""
    return _package(path) in HOSTS and all(_package(file.path) != 'mmvim' for file in inherited)


def follow_validation(cfg: Config, files: list[ConfigFile]) -> None:
    """Copy validation to test where files first make both the same and then change the validation only.

    ``test_evaluator = val_evaluator`` in a base copies what is there. A child that sets ``val_evaluator`` to another
    metric means the test too, unless it sets ``test_evaluator`` or turns validation off by None. Hosts' own configs
    stay as they are, and so does what was changed since the file was read.
    """
    for kind in SPLIT_KEYS:
        val, test = f'val_{kind}', f'test_{kind}'
        tied = due = has_test = False
        for file in files:
            if test in file.assigned:
                same = file.copies.get(test) == val or file.copies.get(val) == test
                tied, due, has_test = same and (tied or not has_test), False, True
            elif val in file.assigned:
                due = tied = tied and not file.is_hosts
        if due and cfg.get(val) is not None:
            if cfg[test] == Config.fromfile(files[-1].path, import_custom_modules=False)[test]:
                cfg[test] = deepcopy(cfg[val])
