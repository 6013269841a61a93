"""Numba's on-disk cache for files that may be damaged, or that no longer fit on the disk.

Numba unpickles what it finds and runs the machine code in it. A file that a crash or a full disk cut short then ends
every later process with an EOFError, and code with flipped bytes ends it with a crash.
"""

from __future__ import annotations

import hashlib
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

from numba.core import caching


class CheckedFiles(caching.IndexDataCacheFile):
    """Compiled code under its digest. A damaged file counts as none, and compiling goes on if nothing can be written."""

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
        return caching.pickle.loads(content)


@contextmanager
def checked_cache() -> Iterator[None]:
    """Within it, functions that Numba compiles are cached in files of this kind."""
    before = caching.IndexDataCacheFile
    caching.IndexDataCacheFile = CheckedFiles
    try:
        yield
    finally:
        caching.IndexDataCacheFile = before
