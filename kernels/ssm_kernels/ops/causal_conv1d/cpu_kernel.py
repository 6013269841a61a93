"""Numba code of the depthwise convolution along the tokens on a CPU: explicit vectors over channels, blocks of tokens.

Source: the short convolution of Mamba, arXiv 2312.00752, section 3.4.
"""

# K directions (1 or 2), B batch, L tokens, D channels, W width

from __future__ import annotations

from numba import carray

from ...cpu_threads import Worker
from ...cpu_vectors import (
    FB,
    LANES,
    VB,
    add,
    address_of,
    fill_tile,
    fma,
    function,
    inline,
    load,
    load_row,
    load_tile,
    mul,
    params_dtype,
    silu,
    silu_slope,
    splat,
    store,
    store_row,
    store_tile,
    take_ticket,
)

BLOCK = 128  # tokens of a task
MAX_WIDTH = 4

# Addresses, strides in bytes, sizes
PARAMS = params_dtype('K B L D W reverse same silu x x_b x_l weight bias y dy dx dweight dbias')


@inline
def sign_of(a, k):
    """+1 for a direction that reads the tokens before its own, -1 for the other one."""
    return -1 if (k == 1) or (a.K == 1 and a.reverse != 0) else 1


@inline
def lookahead(a):
    """Tokens that the convolution reads beyond its own, in the direction's order."""
    return a.W - 1 - (a.W - 1) // 2 if a.same else 0


@function
def load_conv(weight, bias, d0, m, W, p_conv, spare):
    """A tile's weights, one row for each tap, and in row MAX_WIDTH its bias. The arguments are addresses."""
    load_tile(p_conv, weight + FB * d0 * W, m, W, 1.0)
    store(p_conv + VB * MAX_WIDTH, load_row(bias + FB * d0, m, spare) if bias else splat(0.0))


@inline
def convolve(p_x, s_x, token, sign, ahead, L, W, p_conv, m, spare):
    """The tile's convolution at a token, before the activation. p_x is the address of its channels of token 0."""
    v = load(p_conv + VB * MAX_WIDTH)
    at = token + sign * (ahead - W + 1)
    for j in range(W):
        if 0 <= at < L:
            v = fma(load(p_conv + VB * j), load_row(p_x + s_x * at, m, spare), v)
        at += sign
    return v


def scratch_bytes() -> int:
    """Of a backward task: the tile's weights, their gradients, a spare row, rows of gradients with a margin, of dx."""
    return VB * (2 * (MAX_WIDTH + 1) + 1 + BLOCK + 2 * MAX_WIDTH + BLOCK)


@function
def forward_block(a, i_b, l0, scratch):
    """Convolves a block of tokens of one image in all directions."""
    L, D, W, ahead = a.L, a.D, a.W, lookahead(a)
    T, spare = min(BLOCK, L - l0), scratch + VB * (MAX_WIDTH + 1)
    for d0 in range(0, D, LANES):
        m = min(LANES, D - d0)
        p_x = a.x + i_b * a.x_b + FB * d0
        for k in range(a.K):
            load_conv(a.weight + FB * k * D * W, a.bias + FB * k * D if a.bias else 0, d0, m, W, scratch, spare)
            sign = sign_of(a, k)
            p_y = a.y + FB * (((k * a.B + i_b) * L + l0) * D + d0)
            for t in range(T):
                v = convolve(p_x, a.x_l, l0 + t, sign, ahead, L, W, scratch, m, spare)
                store_row(p_y, silu(v) if a.silu else v, m, spare)
                p_y += FB * D


@function
def fill_gradients(a, k, i_b, first, last, d0, m, p_conv, p_g, spare):
    """Gradients at the convolution's result, before the activation, of the tokens from first to last."""
    L, D, W, sign, ahead = a.L, a.D, a.W, sign_of(a, k), lookahead(a)
    p_x = a.x + i_b * a.x_b + FB * d0
    p_dy = a.dy + FB * (((k * a.B + i_b) * L + first) * D + d0)
    for token in range(first, last):
        v_g = load_row(p_dy, m, spare)
        if a.silu:
            v = convolve(p_x, a.x_l, token, sign, ahead, L, W, p_conv, m, spare)
            v_g = mul(v_g, silu_slope(v))
        store(p_g, v_g)
        p_g += VB
        p_dy += FB * D


@function
def backward_block(a, i_b, l0, task, scratch):
    """dx of a block of tokens, and the block's share of the gradients of weights and bias."""
    L, D, W, ahead = a.L, a.D, a.W, lookahead(a)
    p_conv, p_dw = scratch, scratch + VB * (MAX_WIDTH + 1)
    spare = p_dw + VB * (MAX_WIDTH + 1)
    p_g0, p_dx0 = spare + VB, spare + VB * (1 + BLOCK + 2 * MAX_WIDTH)
    end = min(l0 + BLOCK, L)
    first, last = max(0, l0 - W + 1), min(L, end + W - 1)
    for d0 in range(0, D, LANES):
        m = min(LANES, D - d0)
        p_x = a.x + i_b * a.x_b + FB * d0
        fill_tile(p_dx0, end - l0, 0.0)
        for k in range(a.K):
            sign = sign_of(a, k)
            load_conv(a.weight + FB * k * D * W, a.bias + FB * k * D if a.bias else 0, d0, m, W, p_conv, spare)
            fill_gradients(a, k, i_b, first, last, d0, m, p_conv, p_g0, spare)
            fill_tile(p_dw, MAX_WIDTH + 1, 0.0)
            for j in range(W):
                shift = sign * (j + ahead - W + 1)  # token l reads token l + shift
                v_w, v_dw = load(p_conv + VB * j), splat(0.0)
                for token in range(max(l0, -shift), min(end, L - shift)):
                    v_dw = fma(
                        load(p_g0 + VB * (token - first)), load_row(p_x + a.x_l * (token + shift), m, spare), v_dw
                    )
                store(p_dw + VB * j, v_dw)
                for token in range(max(l0, first + shift), min(end, last + shift)):
                    p_dx = p_dx0 + VB * (token - l0)
                    store(p_dx, fma(v_w, load(p_g0 + VB * (token - shift - first)), load(p_dx)))
            v_db = splat(0.0)
            for token in range(l0, end):
                v_db = add(v_db, load(p_g0 + VB * (token - first)))
            o = (task * a.K + k) * D + d0
            store_row(a.dbias + FB * o, v_db, m, spare)
            store_tile(a.dweight + FB * o * W, p_dw, m, W, 1.0)
        p_out = a.dx + FB * ((i_b * L + l0) * D + d0)
        for t in range(end - l0):
            store_row(p_out, load(p_dx0 + VB * t), m, spare)
            p_out += FB * D


def make_forward(stamp):
    """Makes the forward worker; ``stamp`` becomes part of the key under which Numba caches it."""

    def forward(params):
        """A worker; one task is one block of tokens of one image, in all directions."""
        a, counters = carray(params, 1)[0], address_of(params)
        scratch = a.scratch + take_ticket(counters + 8) * a.scratch_bytes
        blocks = (a.L + BLOCK - 1) // BLOCK
        while stamp:  # never 0
            task = take_ticket(counters)
            if task >= a.n_tasks:
                break
            forward_block(a, task // blocks, task % blocks * BLOCK, scratch)

    return forward


def make_backward(stamp):
    """Makes the backward worker; ``stamp`` as in :func:`make_forward`."""

    def backward(params):
        """A worker; tasks as in ``forward``."""
        a, counters = carray(params, 1)[0], address_of(params)
        scratch = a.scratch + take_ticket(counters + 8) * a.scratch_bytes
        blocks = (a.L + BLOCK - 1) // BLOCK
        while stamp:  # never 0
            task = take_ticket(counters)
            if task >= a.n_tasks:
                break
            backward_block(a, task // blocks, task % blocks * BLOCK, task, scratch)

    return backward


forward = Worker(make_forward, PARAMS)
backward = Worker(make_backward, PARAMS)
