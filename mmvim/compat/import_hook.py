"""Change a module of a host as soon as it is imported, without importing it."""

import sys
from collections.abc import Callable, Sequence
from importlib.abc import MetaPathFinder
from importlib.machinery import ModuleSpec, PathFinder
from types import ModuleType


class _Finder(MetaPathFinder):
    def __init__(self, name: str, change: Callable[[ModuleType], None]) -> None:
        self.name = name
        self.change = change

    def find_spec(
        self, fullname: str, path: Sequence[str] | None = None, target: ModuleType | None = None
    ) -> ModuleSpec | None:
        spec = PathFinder.find_spec(fullname, path, target) if fullname == self.name else None
        if spec is None or spec.loader is None:
            return None
        execute = spec.loader.exec_module

        def exec_module(module: ModuleType) -> None:
            execute(module)
            for finder in reversed(sys.meta_path):  # Python asks one finder only; the oldest stands last
                if isinstance(finder, _Finder) and finder.name == self.name:
                    finder.change(module)

        spec.loader.exec_module = exec_module
        return spec


def when_imported(name: str, change: Callable[[ModuleType], None]) -> None:
    """Call a function with a module: now if it is imported already, or else as soon as it is.

    Args:
        name: the module's full name.
        change: the function; asking twice for the same one and module counts once.
    """
    known = (finder for finder in sys.meta_path if isinstance(finder, _Finder))
    if any((finder.name, finder.change) == (name, change) for finder in known):
        return
    sys.meta_path.insert(0, _Finder(name, change))
    if name in sys.modules:
        change(sys.modules[name])


def replace_everywhere(name: str, original: object, new: object) -> None:
    """Put a function in the place of another, also in the modules that have imported it by name.

    Args:
        name: of both, in every module.
        original: the host's.
        new: what takes its place.
    """
    for module in tuple(sys.modules.values()):
        names = getattr(module, '__dict__', {})
        if names.get(name) is original:
            names[name] = new
