"""Choice of a backend: each op has one table, in order of preference, and every backend answers with reasons."""

from __future__ import annotations

import importlib.util
from collections.abc import Callable, Sequence
from contextlib import suppress
from dataclasses import dataclass

import torch
from torch import Tensor


@dataclass(frozen=True)
class Backend:
    """One way to run an op.

    Attributes:
        name: what callers pass as ``backend=``.
        why_not: called with the input tensor and the size that backends limit (state size, width, channels of a
            row); returns why this backend cannot run them, or None if it can.
        load: imports the backend and returns the function that runs the op.
    """

    name: str
    why_not: Callable[[Tensor, int], str | None]
    load: Callable[[], Callable]


def choose_backend(op: str, table: Sequence[Backend], forced: str | None, x: Tensor, n: int) -> Backend:
    """The first backend of ``table`` that can run ``x``, or the forced one.

    Raises:
        ValueError: if ``forced`` is no name of the table.
        RuntimeError: if the forced backend cannot run this (there is no silent fallback), or if none can.
    """
    if forced is not None and not (isinstance(forced, str) and forced in [backend.name for backend in table]):
        raise ValueError(f'{op}: unknown backend {forced!r}; choose one of {[backend.name for backend in table]}')
    reasons = []
    for backend in table:
        if forced is not None and backend.name != forced:
            continue
        reason = backend.why_not(x, n)
        if reason is None:
            return backend
        reasons.append(f'backend {backend.name!r} cannot run this: {reason}')
    raise RuntimeError(f'{op}: ' + '; '.join(reasons))


# Looked up once, so that torch.compile meets a constant.
_INSTALLED = {name: importlib.util.find_spec(name) is not None for name in ('numba', 'triton')}


def missing_package(name: str) -> bool:
    """Whether the package, 'numba' or 'triton', is not installed (looked up, not imported)."""
    return not _INSTALLED[name]


def triton_why_not(x: Tensor, n: int) -> str | None:
    """Why no Triton kernel of this package can run x; None if one can."""
    if x.device.type not in ('cuda', 'xpu'):
        return f'tensors are on {x.device.type}; Triton needs cuda, hip or xpu'
    if x.dtype == torch.float64:
        return 'the kernel computes in float32, the tensors are float64'
    if missing_package('triton'):
        return 'triton is not installed (pip install triton)'
    return None


def numba_why_not(x: Tensor, n: int) -> str | None:
    """Why no Numba kernel of this package can run x; None if one can."""
    if x.device.type != 'cpu':
        return f'tensors are on {x.device.type}; Numba runs on the cpu'
    if x.dtype == torch.float64:
        return 'the kernel computes in float32, the tensors are float64'
    if missing_package('numba'):
        return 'numba is not installed (pip install numba)'
    return None


def load_tables(tables: Sequence[Sequence[Backend]], name: str | None) -> None:
    """Import the backends of some ops that can run on a device of this machine, or those of one name."""
    gpu = torch.cuda.is_available() or torch.xpu.is_available()
    wanted = {'torch': True, 'numba': not missing_package('numba'), 'triton': gpu and not missing_package('triton')}
    for table in tables:
        for backend in table:
            if wanted[backend.name] and name in (None, backend.name):
                with suppress(ImportError):
                    backend.load()
