"""Numba code of all that stands between the projections of a Mamba mixer, for inference on a CPU.

Two passes over the tokens. ``project`` convolves a block of tokens and multiplies it by x_proj while it is in the
cache: only the few columns of (dt, B, C) are written. ``scan`` convolves again, tile by tile of channels, multiplies
by dt_proj, scans and gates. What the convolution and dt_proj make, u and delta, is never written to memory.
"""

# K directions (1 or 2), B batch, L tokens, D channels, N state size, R rank of dt, P = R + 2N, W width, CH chunk

from __future__ import annotations

from numba import carray

from ...cpu_threads import Worker
from ...cpu_vectors import (
    FB,
    HB,
    LANES,
    LOG2E,
    T_MIN,
    VB,
    add,
    address_of,
    all_at_most,
    broadcast,
    fill_tile,
    fma,
    function,
    half_sum,
    inline,
    load,
    load_half,
    load_row,
    load_tile,
    maximum,
    mul,
    neg,
    params_dtype,
    put,
    silu,
    softplus,
    splat,
    splat_half,
    store,
    store_row,
    take_ticket,
)
from ..causal_conv1d.cpu_kernel import MAX_WIDTH, convolve, load_conv, lookahead, sign_of
from ..selective_scan.cpu_kernel import CH, scan_rows, scan_rows_any

BLOCK = 64  # tokens of a task of `project`

# Addresses (those of the second direction end in _b), strides in bytes, sizes
PARAMS = params_dtype(
    'K B L D DP N R W reverse same x x_b x_l z z_b z_l rows out slab '
    'conv conv_b conv_bias conv_bias_b x_proj x_proj_b dt_proj dt_proj_b dt_bias dt_bias_b A A_b skip skip_b'
)


# ---- (dt, B, C) ----


def project_scratch_bytes(D: int) -> int:
    """Bytes of scratch memory of a task of ``project``: u of a block, padded, and the convolution of a tile."""
    return (BLOCK + 3) * padded(D) * FB + VB * (MAX_WIDTH + 2)


def padded(D: int) -> int:
    """D rounded up to whole vectors."""
    return -(-D // LANES) * LANES


@function
def dot_rows(p_u, s_u, p_w, s_w, rows_w, p_out, s_out, rows_u):
    """Products of 4 rows of u and 3 rows of weights, of which rows_u and rows_w are wanted."""
    w0, w1, w2 = p_w, p_w + s_w * min(1, rows_w - 1), p_w + s_w * min(2, rows_w - 1)
    a0 = a1 = a2 = b0 = b1 = b2 = c0 = c1 = c2 = d0 = d1 = d2 = splat_half(0.0)
    u = p_u
    for _ in range(s_w // HB):
        x0, x1, x2 = load_half(w0), load_half(w1), load_half(w2)
        v = load_half(u)
        a0, a1, a2 = fma(v, x0, a0), fma(v, x1, a1), fma(v, x2, a2)
        v = load_half(u + s_u)
        b0, b1, b2 = fma(v, x0, b0), fma(v, x1, b1), fma(v, x2, b2)
        v = load_half(u + 2 * s_u)
        c0, c1, c2 = fma(v, x0, c0), fma(v, x1, c1), fma(v, x2, c2)
        v = load_half(u + 3 * s_u)
        d0, d1, d2 = fma(v, x0, d0), fma(v, x1, d1), fma(v, x2, d2)
        u += HB
        w0 += HB
        w1 += HB
        w2 += HB
    put_sums(p_out, a0, a1, a2, rows_w)
    if rows_u > 1:
        put_sums(p_out + s_out, b0, b1, b2, rows_w)
    if rows_u > 2:
        put_sums(p_out + 2 * s_out, c0, c1, c2, rows_w)
    if rows_u > 3:
        put_sums(p_out + 3 * s_out, d0, d1, d2, rows_w)


@inline
def put_sums(p_out, v0, v1, v2, m):
    """Writes the sums of the first m of three accumulators, neighbours in memory."""
    put(p_out, half_sum(v0))
    if m > 1:
        put(p_out + FB, half_sum(v1))
    if m > 2:
        put(p_out + 2 * FB, half_sum(v2))


@function
def project_block(a, k, i_b, l0, scratch):
    """(dt, B, C) of one block of tokens."""
    D, P, sign, ahead = a.D, a.R + 2 * a.N, sign_of(a, k), lookahead(a)
    T = min(BLOCK, a.L - l0)
    s_u = (D + LANES - 1) // LANES * VB
    p_conv = scratch + (BLOCK + 3) * s_u
    spare = p_conv + VB * (MAX_WIDTH + 1)
    conv, bias, x_proj = a.conv, a.conv_bias, a.x_proj
    if k == 1:
        conv, bias, x_proj = a.conv_b, a.conv_bias_b, a.x_proj_b
    for d0 in range(0, D, LANES):
        m = min(LANES, D - d0)
        load_conv(conv, bias, d0, m, a.W, p_conv, spare)
        p_x = a.x + i_b * a.x_b + FB * d0
        p_u = scratch + FB * d0
        for t in range(T):
            store(p_u, silu(convolve(p_x, a.x_l, l0 + t, sign, ahead, a.L, a.W, p_conv, m, spare)))
            p_u += s_u
    p_rows = a.rows + FB * P * ((k * a.B + i_b) * a.L + l0)
    for p in range(0, P, 3):
        for t in range(0, T, 4):
            dot_rows(
                scratch + t * s_u, s_u, x_proj + FB * a.DP * p, FB * a.DP, min(3, P - p),
                p_rows + FB * (P * t + p), FB * P, min(4, T - t),
            )  # fmt: skip


def make_project(stamp):
    """Makes the worker of the first pass; ``stamp`` becomes part of the key under which Numba caches it."""

    def project(params):
        """A worker; one task is one block of tokens of one image in one direction."""
        a, counters = carray(params, 1)[0], address_of(params)
        scratch = a.scratch + take_ticket(counters + 8) * a.scratch_bytes
        blocks = (a.L + BLOCK - 1) // BLOCK
        while stamp:  # never 0
            task = take_ticket(counters)
            if task >= a.n_tasks:
                break
            project_block(a, task // (a.B * blocks), task // blocks % a.B, task % blocks * BLOCK, scratch)

    return project


# ---- scan ----

ROW = 3 * VB  # delta, delta * u, <C, h>, as scan_rows has them
O_DL, O_DU, O_Y = 0, VB, 2 * VB


@function
def tile_bytes(N, R):
    """Bytes of what a tile keeps from chunk to chunk: A, h, dt_proj, convolution, largest A, skip, dt bias."""
    return VB * (2 * N + R + MAX_WIDTH + 4)


def scan_scratch_bytes(N: int, R: int, slab: int) -> int:
    """Bytes of scratch memory of a task of ``scan``: rows of a chunk, a spare vector, the tiles."""
    return CH * (ROW + VB) + VB + slab * VB * (2 * N + R + MAX_WIDTH + 4)


@function
def load_scan_weights(a, k, d0, m, tile, spare):
    """The tile's A in base-2 logarithms and its largest magnitude over n, dt_proj, convolution, skip and dt bias."""
    N, R = a.N, a.R
    A, dt_proj, dt_bias, skip, conv, bias = a.A, a.dt_proj, a.dt_bias, a.skip, a.conv, a.conv_bias
    if k == 1:
        A, dt_proj, dt_bias, skip, conv, bias = a.A_b, a.dt_proj_b, a.dt_bias_b, a.skip_b, a.conv_b, a.conv_bias_b
    load_tile(tile, A + FB * d0 * N, m, N, LOG2E)
    v_max = splat(0.0)
    for n in range(N):
        v_a = load(tile + VB * n)
        v_max = maximum(v_max, maximum(v_a, neg(v_a)))
    fill_tile(tile + VB * N, N, 0.0)
    p = tile + VB * 2 * N
    load_tile(p, dt_proj + FB * d0 * R, m, R, 1.0)
    p += VB * R
    load_conv(conv, bias, d0, m, a.W, p, spare)
    p += VB * (MAX_WIDTH + 1)
    store(p, v_max)
    store(p + VB, load_row(skip + FB * d0, m, spare) if skip else splat(0.0))
    store(p + 2 * VB, load_row(dt_bias + FB * d0, m, spare) if dt_bias else splat(0.0))


@function
def fill_rows(a, rows, us, T, p_x, first, sign, ahead, p_row, s_row, p_dt, p_conv, m, spare):
    """Writes u, delta and delta * u, clears <C, h>; returns whether 2^(delta A) needs no clamp in this chunk."""
    L, W, R, s_x = a.L, a.W, a.R, a.x_l
    p_max = p_conv + VB * (MAX_WIDTH + 1)
    v_max, v_bias = splat(0.0), load(p_max + 2 * VB)
    for t in range(T):
        v_u = silu(convolve(p_x, s_x, first + sign * t, sign, ahead, L, W, p_conv, m, spare))
        v_even, v_odd, p, w = v_bias, splat(0.0), p_row, p_dt
        for _ in range(R // 2):
            v_even = fma(broadcast(p), load(w), v_even)
            v_odd = fma(broadcast(p + FB), load(w + VB), v_odd)
            p += 2 * FB
            w += 2 * VB
        if R % 2:
            v_even = fma(broadcast(p), load(w), v_even)
        v_dl = softplus(add(v_even, v_odd))
        v_max = maximum(v_dl, v_max)
        store(us, v_u)
        store(rows + O_DL, v_dl)
        store(rows + O_DU, mul(v_dl, v_u))
        store(rows + O_Y, splat(0.0))
        rows += ROW
        us += VB
        p_row += s_row
    return all_at_most(mul(v_max, load(p_max)), splat(-T_MIN))


@function
def finish_rows(a, rows, us, T, first, last, p_out, s_out, p_z, s_z, v_skip, m, spare):
    """Adds D * u (last: its size would cost the small terms their digits) and the earlier direction; gates, scales."""
    v_scale = splat(a.scale)
    for _ in range(T):
        v_y = fma(v_skip, load(us), load(rows + O_Y))
        if not first:
            v_y = add(v_y, load_row(p_out, m, spare))
        if last:
            if a.z:
                v_z = load_row(p_z, m, spare)
                v_y = mul(v_y, silu(v_z))
            v_y = mul(v_y, v_scale)
        store_row(p_out, v_y, m, spare)
        rows += ROW
        us += VB
        p_out += s_out
        p_z += s_z


@function
def scan_slab(a, i_b, i_s, rows):
    """All directions of a.slab neighbouring tiles: the tiles inside a chunk, so that its pages are fetched once."""
    N, L, D, R, P = a.N, a.L, a.D, a.R, a.R + 2 * a.N
    us = rows + CH * ROW
    spare = us + CH * VB
    tile0, bytes_of_tile = spare + VB, tile_bytes(N, R)
    n_tiles = min(a.slab, (D - i_s * a.slab * LANES + LANES - 1) // LANES)
    for k in range(a.K):
        sign, ahead = sign_of(a, k), lookahead(a)
        token = 0 if sign == 1 else L - 1
        s_row, s_out, s_z = sign * FB * P, sign * FB * D, sign * a.z_l
        for i in range(n_tiles):
            d0 = (i_s * a.slab + i) * LANES
            load_scan_weights(a, k, d0, min(LANES, D - d0), tile0 + i * bytes_of_tile, spare)
        for l0 in range(0, L, CH):
            T = min(CH, L - l0)
            l_first = token + sign * l0
            p_row = a.rows + FB * P * ((k * a.B + i_b) * L + l_first)
            p_B, p_C = p_row + FB * R, p_row + FB * (R + N)
            for i in range(n_tiles):
                tile = tile0 + i * bytes_of_tile
                d0 = (i_s * a.slab + i) * LANES
                m = min(LANES, D - d0)
                p_h, p_dt = tile + VB * N, tile + VB * 2 * N
                p_conv = p_dt + VB * R
                v_skip = load(p_conv + VB * (MAX_WIDTH + 2))
                p_x = a.x + i_b * a.x_b + FB * d0
                tame = fill_rows(a, rows, us, T, p_x, l_first, sign, ahead, p_row, s_row, p_dt, p_conv, m, spare)
                if tame:
                    scan_rows(rows, T, N, tile, p_h, p_B, s_row, p_C, s_row)
                else:
                    scan_rows_any(rows, T, N, tile, p_h, p_B, s_row, p_C, s_row, 0, 0, False, False)
                p_out = a.out + FB * ((i_b * L + l_first) * D + d0)
                p_z = a.z + i_b * a.z_b + l_first * a.z_l + FB * d0
                finish_rows(a, rows, us, T, k == 0, k == a.K - 1, p_out, s_out, p_z, s_z, v_skip, m, spare)


def make_scan(stamp):
    """Makes the worker of the second pass; ``stamp`` as in :func:`make_project`."""

    def scan(params):
        """A worker; one task is a slab of channels of one image in all directions."""
        a, counters = carray(params, 1)[0], address_of(params)
        scratch = a.scratch + take_ticket(counters + 8) * a.scratch_bytes
        slabs = (a.D + a.slab * LANES - 1) // (a.slab * LANES)
        while stamp:  # never 0
            task = take_ticket(counters)
            if task >= a.n_tasks:
                break
            scan_slab(a, task // slabs, task % slabs, scratch)

    return scan


_USED = ('ssm_kernels.ops.selective_scan.cpu_kernel', 'ssm_kernels.ops.causal_conv1d.cpu_kernel')
project = Worker(make_project, PARAMS, *_USED)
scan = Worker(make_scan, PARAMS, *_USED)
