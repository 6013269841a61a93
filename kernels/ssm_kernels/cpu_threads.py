"""Runs Numba workers on CPU threads.

The workers run on the OpenMP threads that PyTorch itself uses, called by address, and not in Numba's threading layer:
as many as ``torch.get_num_threads()`` says, safe from several Python threads, and nothing global changes for the user's
other Numba code. Where PyTorch has no such OpenMP, and in a forked child (OpenMP threads do not survive a fork), they
run on Python threads, which the kernel leaves free of the interpreter lock.
"""

from __future__ import annotations

import ctypes
import os
import struct
import threading
from collections.abc import Callable
from functools import lru_cache
from pathlib import Path
from typing import Any, overload

import numpy as np
import torch
from torch import Tensor

from .cpu_vectors import compile_worker

_compile_lock = threading.Lock()
_WORKER_TYPE = ctypes.CFUNCTYPE(None, ctypes.c_void_p)
_held = threading.local()
_forked = False


def _after_fork() -> None:
    global _forked, _compile_lock
    _forked, _compile_lock = True, threading.Lock()


if hasattr(os, 'register_at_fork'):
    os.register_at_fork(after_in_child=_after_fork)


def empty(*shape: int) -> Tensor:
    """All memory of the Numba backends comes from here, so that tests can poison it."""
    return torch.empty(shape, dtype=torch.float32)


def scratch(size: int) -> Tensor:
    """Floats for the duration of one call of a worker, kept for the next one: fresh pages cost more than the work."""
    held = getattr(_held, 'scratch', None)
    if held is None or held.numel() < size:
        held = _held.scratch = empty(size)
    return held


@lru_cache(maxsize=1)
def openmp() -> Callable | None:
    """GOMP_parallel of the OpenMP library that PyTorch is linked with."""
    for name in ('libtorch_cpu.so', 'libtorch_cpu.dylib'):
        path = Path(torch.__file__).parent / 'lib' / name
        try:
            entry = ctypes.CDLL(str(path)).GOMP_parallel
        except (OSError, AttributeError):
            continue
        entry.argtypes = [_WORKER_TYPE, ctypes.c_void_p, ctypes.c_uint, ctypes.c_uint]
        entry.restype = None
        return entry
    return None


class Worker:
    """A compiled function that takes numbered tasks from a counter until none is left; several threads run it at once.

    Args:
        make: given a number, returns the function of the parameter block to compile (see ``compile_worker``).
        params: the parameter block (``params_dtype``).
        modules: modules, other than its own, whose functions it uses.
    """

    def __init__(self, make: Callable[[int], Callable], params: np.dtype, *modules: str) -> None:
        self._make, self._params, self._modules = make, params, modules
        *words, scale = params.names or ()
        self._defaults = dict.fromkeys(words, 0) | {scale: 1.0}  # in the order of the block
        self._pack = struct.Struct(f'{len(words)}qd')
        self.compiled: Any = None  # what Numba makes of it
        self._entry: Callable | None = None

    def entry(self) -> Callable:
        """The worker as a ctypes function, which gives the interpreter lock away while it runs; compiles it once."""
        if self._entry is None:
            with _compile_lock:
                if self._entry is None:
                    self.compiled = compile_worker(self._make, self._params, *self._modules)
                    self._entry = _WORKER_TYPE(self.compiled.address)
        return self._entry

    def __call__(self, scratch_bytes: int, n_tasks: int, fields: dict[str, float]) -> None:
        """Runs all tasks on up to torch.get_num_threads() threads with scratch_bytes, aligned to 64, for each."""
        entry = self.entry()
        threads = max(1, min(torch.get_num_threads(), n_tasks))
        stride = (scratch_bytes + 127) // 64 * 64
        memory = scratch(threads * stride // 4 + 16)
        fields |= {'n_tasks': n_tasks, 'scratch': (memory.data_ptr() + 63) // 64 * 64, 'scratch_bytes': stride}
        packed = self._pack.pack(*(self._defaults | fields).values())
        block = ctypes.create_string_buffer(packed, self._pack.size)
        params = ctypes.addressof(block)
        parallel = None if _forked else openmp()
        if threads == 1:
            entry(params)
        elif parallel is not None:
            parallel(entry, params, threads, 0)
        else:
            others = [threading.Thread(target=entry, args=(params,)) for _ in range(threads - 1)]
            for thread in others:
                thread.start()
            entry(params)
            for thread in others:
                thread.join()


@overload
def rows(x: Tensor) -> Tensor: ...
@overload
def rows(x: None) -> None: ...
def rows(x: Tensor | None) -> Tensor | None:
    """float32 with neighbouring channels (or states) next to each other; other strides are free."""
    if x is None:
        return None
    x = x if x.dtype == torch.float32 else x.float()
    return x if x.stride(-1) == 1 or x.shape[-1] == 1 else x.contiguous()


@overload
def whole(x: Tensor) -> Tensor: ...
@overload
def whole(x: None) -> None: ...
def whole(x: Tensor | None) -> Tensor | None:
    """float32 and contiguous."""
    if x is None or (x.dtype == torch.float32 and x.is_contiguous()):
        return x
    return x.to(torch.float32).contiguous()


def address(x: Tensor | None) -> int:
    """Where x's first value lies; 0 if there is no x."""
    return 0 if x is None else x.data_ptr()
