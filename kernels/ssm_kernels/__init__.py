"""Kernels for vision state-space models: tensors in, tensors out.

Importing this package loads PyTorch only; Numba and Triton load when a backend that needs them first runs.
"""

from .selective_scan import bidirectional_selective_scan, selective_scan, selective_scan_fn

__all__ = ['bidirectional_selective_scan', 'selective_scan', 'selective_scan_fn']
