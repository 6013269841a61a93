"""All between the projections of a Mamba mixer on a CPU: host side of the Numba kernel and the PyTorch operator."""

# K directions (1 or 2), B batch, L tokens, D channels, N state size, R rank of dt, P = R + 2N

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from ...cpu_threads import address, empty, rows, whole
from ...cpu_vectors import HALF, LANES
from ...operators import define
from . import cpu_kernel
from .weights import DirectionWeights

SLAB = 6  # tiles that one task of the scan takes where there are enough tasks for all threads
WORDS = ('conv', 'conv_bias', 'x_proj', 'dt_proj', 'A', 'skip', 'dt_bias')  # of DirectionWeights, in order


def _forward(x: Tensor, z: Tensor | None, weights: list[Tensor], scale: float, reverse: bool, same: bool) -> Tensor:
    batch, length, dim = x.shape
    dtype = x.dtype
    x, z = rows(x), rows(z)
    n, rank, width = weights[4].shape[1], weights[3].shape[1], weights[0].shape[1]
    weights = [whole(w) for w in weights]
    K = len(weights) // len(WORDS)
    if dim % HALF:
        for i in range(2, len(weights), len(WORDS)):
            weights[i] = F.pad(weights[i], (0, -dim % HALF))
    out = empty(batch, length, dim)
    projected = empty(K, batch, length, rank + 2 * n)
    tiles = -(-dim // LANES)
    slab = max(1, min(SLAB, batch * tiles // (4 * torch.get_num_threads())))
    fields = {
        'K': K, 'B': batch, 'L': length, 'D': dim, 'DP': weights[2].shape[1], 'N': n, 'R': rank, 'W': width,
        'reverse': reverse, 'same': same, 'scale': scale, 'slab': slab, 'rows': projected.data_ptr(),
        'out': out.data_ptr(), 'x': x.data_ptr(), 'x_b': 4 * x.stride(0), 'x_l': 4 * x.stride(1),
    }  # fmt: skip
    if z is not None:
        fields |= {'z': z.data_ptr(), 'z_b': 4 * z.stride(0), 'z_l': 4 * z.stride(1)}
    for word, w in zip(WORDS, weights, strict=False):
        fields[word] = address(w if w.numel() else None)
    for word, w in zip(WORDS, weights[len(WORDS) :], strict=False):
        fields[f'{word}_b'] = address(w if w.numel() else None)
    blocks = -(-length // cpu_kernel.BLOCK)
    cpu_kernel.project(cpu_kernel.project_scratch_bytes(dim), K * batch * blocks, fields)
    cpu_kernel.scan(cpu_kernel.scan_scratch_bytes(n, rank, slab), batch * -(-tiles // slab), fields)
    return out if dtype == torch.float32 else out.to(dtype)


def _forward_fake(x, z, weights, scale, reverse, same):
    return x.new_empty(x.shape)


forward_op = define(
    'mamba_inner_numba',
    _forward,
    _forward_fake,
    '(Tensor x, Tensor? z, Tensor[] weights, float scale, bool reverse, bool same) -> Tensor',
    'CPU',
)


def mamba_inner_numba(
    x: Tensor, z: Tensor | None, weights: list[DirectionWeights], scale: float, reverse: bool, padding: str
) -> Tensor:
    """``mamba_inner`` without gradients."""
    absent = x.new_empty(0)  # torch.jit.trace knows no lists with None
    flat = [absent if t is None else t for w in weights for t in w]
    return forward_op(x, z, flat, scale, reverse, padding == 'same')
