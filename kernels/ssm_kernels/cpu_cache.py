"""Numba's on-disk cache for files that may be damaged, or that no longer fit on the disk.

Numba unpickles what it finds and runs the machine code in it. A file that a crash or a full disk cut short then ends
every later process with an EOFError, and code with flipped bytes ends it with a crash.
"""

from __future__ import annotations

import hashlib
import pickle
from collections.abc import Callable
from typing import Any

from numba.core.caching import IndexDataCacheFile
from numba.core.ccallback import CFunc
from numba.core.sigutils import normalize_signature


class CheckedFiles(IndexDataCacheFile):
    """Compiled code behind its digest: a damaged file counts as none, and one that cannot be written is left out."""

    def save(self, key: object, data: object) -> None:
        """Save a compiled function, if there is room."""
        try:
            super().save(key, data)
        except OSError:
            pass

    def _load_index(self) -> dict:
        try:
            return dict(super()._load_index())
        except Exception:  # whatever unpickling makes of damaged bytes
            return {}

    def _save_data(self, name: str, data: object) -> None:
        content = self._dump(data)
        with self._open_for_write(self._data_path(name)) as file:
            file.write(hashlib.sha256(content).digest() + content)

    def _load_data(self, name: str) -> Any:
        with open(self._data_path(name), 'rb') as file:
            digest, content = file.read(32), file.read()
        if hashlib.sha256(content).digest() != digest:
            raise OSError(f'{name} is damaged')  # which Numba takes for a missing file
        return pickle.loads(content)


def compile_cached(worker: Callable, signature: Any, **options: Any) -> Any:
    """Numba's `cfunc(signature, cache=True, **options)(worker)` with files of this kind.

    Raises:
        RuntimeError: if Numba finds no folder that it may write to.
    """
    compiled: Any = CFunc(worker, normalize_signature(signature), locals={}, options=options)
    compiled.enable_caching()
    cache = compiled._cache
    stamp = cache._impl.locator.get_source_stamp()
    cache._cache_file = CheckedFiles(cache.cache_path, cache._impl.filename_base, stamp)
    compiled.compile()
    return compiled
