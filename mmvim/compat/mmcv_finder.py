"""Answer `import mmcv._ext` where mmcv was installed without compiled ops, and repair hosts that were imported before.

The finder stands last in `sys.meta_path`: where a compiled `mmcv._ext` exists, Python finds that one first.
"""

import ast
import sys
from collections.abc import Sequence
from importlib import import_module
from importlib.abc import Loader, MetaPathFinder
from importlib.machinery import ModuleSpec
from pathlib import Path
from types import ModuleType

from mmvim.compat import mmcv_ops
from mmvim.compat.lookup import HOSTS

EXTENSION = 'mmcv._ext'


class TorchvisionOpsLoader(Loader):
    """Fills the module `mmcv._ext` with the ops that torchvision has."""

    def create_module(self, spec: ModuleSpec) -> None:
        """Leave the making of the module to Python."""
        return None

    def exec_module(self, module: ModuleType) -> None:
        """Put the served ops into the module; any other name gives an op that explains itself when called."""
        module.__doc__ = mmcv_ops.__doc__
        for op in mmcv_ops.SERVED:
            setattr(module, op.__name__, op)
        module.__getattr__ = other_op


def other_op(name: str):
    """An op that is not served: calling it raises `MissingOpError`."""
    if name.startswith('__'):
        raise AttributeError(f'module {EXTENSION!r} has no attribute {name!r}')
    return mmcv_ops.missing_op(name)


class TorchvisionOpsFinder(MetaPathFinder):
    """Finds `mmcv._ext`, and nothing else."""

    def find_spec(
        self, fullname: str, path: Sequence[str] | None = None, target: ModuleType | None = None
    ) -> ModuleSpec | None:
        """Spec of the module that stands in for `mmcv._ext`; None for every other name."""
        if fullname != EXTENSION:
            return None
        return ModuleSpec(EXTENSION, TorchvisionOpsLoader(), origin='mmvim.compat.mmcv_ops')


def serve_missing_ops() -> None:
    """Let torchvision serve mmcv's ops if they are not compiled, also in hosts that gave them up when imported."""
    if not any(isinstance(finder, TorchvisionOpsFinder) for finder in sys.meta_path):
        sys.meta_path.append(TorchvisionOpsFinder())
    for module in tuple(sys.modules.values()):
        name = getattr(module, '__name__', '')
        if name.startswith(tuple(f'{host}.' for host in HOSTS)) or name == 'mmcv.cnn.bricks.transformer':
            repeat_imports_of_ops(module)


def repeat_imports_of_ops(module: ModuleType) -> None:
    """Repeat a module's guarded imports of mmcv's ops.

    The hosts import ops inside `try: ... except ImportError:` and put None or a function that raises in their place. A
    host imported before the finder stood has kept those; the same imports now succeed.
    """
    if not (getattr(module, '__file__', None) or '').endswith('.py'):
        return
    source = Path(module.__file__).read_text(encoding='utf-8')
    if 'mmcv.ops' not in source and 'MultiScaleDeformableAttention' not in source:
        return
    for guarded in (node for node in ast.parse(source).body if isinstance(node, ast.Try)):
        for statement in guarded.body:
            if isinstance(statement, ast.ImportFrom) and (statement.module or '').startswith('mmcv.'):
                origin = import_module(statement.module)
                for alias in statement.names:
                    setattr(module, alias.asname or alias.name, getattr(origin, alias.name))
