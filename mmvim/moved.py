"""Paths of modules that have moved, kept for code that names the old ones."""

import sys
from collections.abc import Mapping
from importlib import import_module


def keep_paths(moved: Mapping[str, str]) -> None:
    """Let the old path of each module lead to the new one.

    Args:
        moved: old path -> new path; the package of the old one must exist.
    """
    for old, new in moved.items():
        sys.modules[old] = import_module(new)
        package, _, name = old.rpartition('.')
        setattr(sys.modules[package], name, sys.modules[old])
