"""Kernels for vision state-space models: tensors in, tensors out.

Importing this package loads PyTorch only; Numba and Triton load when a backend that needs them first runs.
"""

from .add_rms_norm import add_rms_norm
from .causal_conv1d import bidirectional_causal_conv1d, causal_conv1d, causal_conv1d_fn, same_conv1d
from .mamba_inner import DirectionWeights, mamba_inner
from .selective_scan import bidirectional_selective_scan, selective_scan, selective_scan_fn

__all__ = [
    'DirectionWeights',
    'add_rms_norm',
    'bidirectional_causal_conv1d',
    'bidirectional_selective_scan',
    'causal_conv1d',
    'causal_conv1d_fn',
    'mamba_inner',
    'same_conv1d',
    'selective_scan',
    'selective_scan_fn',
]
