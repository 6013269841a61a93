"""Kernels for vision state-space models: tensors in, tensors out.

Importing this package loads PyTorch only; Numba and Triton load when a backend that needs them first runs, or by
``load_backends``.
"""

from functools import cache

from .dispatch import load_tables
from .ops import add_rms_norm as _add_rms_norm
from .ops import causal_conv1d as _causal_conv1d
from .ops import mamba_inner as _mamba_inner
from .ops import selective_scan as _selective_scan
from .ops.add_rms_norm import add_rms_norm
from .ops.causal_conv1d import bidirectional_causal_conv1d, causal_conv1d, causal_conv1d_fn, same_conv1d
from .ops.mamba_inner import DirectionWeights, mamba_inner
from .ops.selective_scan import bidirectional_selective_scan, selective_scan, selective_scan_fn

_TABLES = tuple(room.BACKENDS for room in (_add_rms_norm, _causal_conv1d, _mamba_inner, _selective_scan))


@cache
def load_backends(backend: str | None = None) -> None:
    """Import a backend, or all that can run on a device of this machine, before the first call of an op.

    Models do so when they are built: under torch.export of PyTorch 2.10, which replaces functions of Python's math
    while it traces, Numba cannot be imported. What cannot be imported at all is left to the call that needs it.

    Args:
        backend: what the ops will be called with: 'triton', 'numba' or 'torch'; None for all of them.
    """
    load_tables(_TABLES, backend)


__all__ = [
    'DirectionWeights',
    'add_rms_norm',
    'bidirectional_causal_conv1d',
    'bidirectional_selective_scan',
    'causal_conv1d',
    'causal_conv1d_fn',
    'load_backends',
    'mamba_inner',
    'same_conv1d',
    'selective_scan',
    'selective_scan_fn',
]
