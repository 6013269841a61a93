"""Numba code of residual addition and RMSNorm on a CPU: explicit vectors over channels, one row after the other.

Source: RMSNorm, arXiv 1910.07467, equation 4.
"""

# T tokens, D channels

from __future__ import annotations

import numpy as np
from numba import carray

from ...cpu_threads import Worker
from ...cpu_vectors import (
    FB,
    LANES,
    VB,
    add,
    address_of,
    broadcast,
    fma,
    fold,
    function,
    half_sum,
    load,
    load_row,
    mul,
    params_dtype,
    put,
    splat,
    store,
    store_row,
    take_ticket,
)

BLOCK = 64  # tokens of a task

# Addresses, strides in bytes, sizes; `scale` is eps
PARAMS = params_dtype('T D x x_l residual residual_l weight stream out rstd dout dstream dx dweight')


@function
def forward_row(a, t, spare):
    """Normalises token t and stores the new residual; returns 1 / sqrt(mean square + eps)."""
    D = a.D
    p_x, p_in = a.x + t * a.x_l, a.residual + t * a.residual_l
    p_stream, p_out = a.stream + FB * t * D, a.out + FB * t * D
    v_sum = splat(0.0)
    for d0 in range(0, D, LANES):
        m = min(LANES, D - d0)
        v = load_row(p_x + FB * d0, m, spare)
        if a.residual:
            v = add(v, load_row(p_in + FB * d0, m, spare))
        store_row(p_stream + FB * d0, v, m, spare)
        v_sum = fma(v, v, v_sum)
    rstd = 1.0 / ((float(half_sum(fold(v_sum))) / D + a.scale) ** 0.5)
    v_rstd = splat(rstd)
    for d0 in range(0, D, LANES):
        m = min(LANES, D - d0)
        v = mul(load_row(p_stream + FB * d0, m, spare), v_rstd)
        store_row(p_out + FB * d0, mul(v, load_row(a.weight + FB * d0, m, spare)), m, spare)
    return rstd


def backward_scratch_bytes(D: int) -> int:
    """Bytes of scratch memory of a backward task: a spare vector, then its share of dweight."""
    return VB * (-(-D // LANES) + 1)


@function
def backward_row(a, t, p_dw, spare):
    """dx = dstream + rstd (g - xhat mean(g xhat)) with g = dout weight and xhat = stream rstd."""
    D, o = a.D, FB * t * a.D
    v_rstd = broadcast(a.rstd + FB * t)
    v_dot = splat(0.0)
    for d0 in range(0, D, LANES):
        m = min(LANES, D - d0)
        v_dout = load_row(a.dout + o + FB * d0, m, spare)
        v_xhat = mul(load_row(a.stream + o + FB * d0, m, spare), v_rstd)
        v_dot = fma(mul(v_dout, load_row(a.weight + FB * d0, m, spare)), v_xhat, v_dot)
        store(p_dw + FB * d0, fma(v_dout, v_xhat, load(p_dw + FB * d0)))
    v_mean = splat(-float(half_sum(fold(v_dot))) / D)
    for d0 in range(0, D, LANES):
        m = min(LANES, D - d0)
        v_g = mul(load_row(a.dout + o + FB * d0, m, spare), load_row(a.weight + FB * d0, m, spare))
        v_xhat = mul(load_row(a.stream + o + FB * d0, m, spare), v_rstd)
        v = mul(fma(v_xhat, v_mean, v_g), v_rstd)
        if a.dstream:
            v = add(v, load_row(a.dstream + o + FB * d0, m, spare))
        store_row(a.dx + o + FB * d0, v, m, spare)


def make_forward(stamp):
    """Makes the forward worker; ``stamp`` becomes part of the key under which Numba caches it."""

    def forward(params):
        """A worker; one task is one block of tokens."""
        a, counters = carray(params, 1)[0], address_of(params)
        scratch = a.scratch + take_ticket(counters + 8) * a.scratch_bytes
        while stamp:  # never 0
            task = take_ticket(counters)
            if task >= a.n_tasks:
                break
            for t in range(task * BLOCK, min(a.T, (task + 1) * BLOCK)):
                put(a.rstd + FB * t, np.float32(forward_row(a, t, scratch)))

    return forward


def make_backward(stamp):
    """Makes the backward worker; ``stamp`` as in :func:`make_forward`."""

    def backward(params):
        """A worker; one task is one block of tokens, with a row of dweight of its own."""
        a, counters = carray(params, 1)[0], address_of(params)
        spare = a.scratch + take_ticket(counters + 8) * a.scratch_bytes
        p_dw = spare + VB
        while stamp:  # never 0
            task = take_ticket(counters)
            if task >= a.n_tasks:
                break
            for d0 in range(0, a.D, LANES):
                store(p_dw + FB * d0, splat(0.0))
            for t in range(task * BLOCK, min(a.T, (task + 1) * BLOCK)):
                backward_row(a, t, p_dw, spare)
            for d0 in range(0, a.D, LANES):
                store_row(a.dweight + FB * (task * a.D + d0), load(p_dw + FB * d0), min(LANES, a.D - d0), spare)

    return backward


forward = Worker(make_forward, PARAMS)
backward = Worker(make_backward, PARAMS)
