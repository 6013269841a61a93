"""Numba code of the selective scan on a CPU: explicit vectors over channels, the state in registers, tokens in chunks.

Source: Mamba, arXiv 2312.00752, equation 2 and algorithm 2; the backward recomputes the states of a chunk from the
state at its start.

A tile of LANES neighbouring channels is one task's unit of work. Per chunk the step sizes and inputs go to scratch rows
that stay in the L1 cache; then, one state n after the other, a loop over the chunk's steps holds h_n in registers.
"""

# K directions (1 or 2), B batch, L tokens, D channels, N state size, G groups of DG = D / G channels, CH steps a chunk

from __future__ import annotations

import numpy as np
from numba import carray

from ...cpu_threads import Worker
from ...cpu_vectors import (
    FB,
    HB,
    LANES,
    LN2,
    LOG2E,
    T_MIN,
    VB,
    add,
    address_of,
    all_at_most,
    broadcast,
    exp2,
    exp2_tame,
    fill_tile,
    fma,
    fold,
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
    sigmoid,
    silu,
    silu_slope,
    softplus,
    splat,
    store,
    store_half,
    store_row,
    store_tile,
    take_ticket,
)

CH = 64  # the backward pass is 2 to 4 % faster with 32, but then twice as many states are kept for it
# Tiles of a backward task, whose shares of dB and dC are added in scratch before they leave it. With 2 there are more
# tasks, but twice the partial sums, which costs 9 to 11 %.
SLAB = 4

# Addresses, strides in bytes, sizes
PARAMS = params_dtype(
    'K B L D N G chunks reverse softplus save const_b const_c '
    'u u_k u_b u_l dt dt_k dt_b dt_l z z_b z_l A Bq B_k B_b B_l B_g Cq C_k C_b C_l C_g skip bias out states last '
    'dout dlast du ddt dA dB dC dB_const dC_const dskip dbias dz slab_bytes slab'
)


@inline
def step_size(a, p_dt, v_bias, m, spare):
    """delta of a tile at one token."""
    x = add(load_row(p_dt, m, spare), v_bias)
    return softplus(x) if a.softplus else x


@inline
def direction(a, k):
    """(token of the first step, +1 or -1)."""
    if (k == 1) if a.K == 2 else (a.reverse != 0):
        return a.L - 1, -1
    return 0, 1


@function
def load_weights(a, k, d0, m, p_A, p_wb, p_wc, p_ones, p_amax):
    """A in base-2 logarithms, its largest magnitude over n, and the lane weights of constant B and C."""
    N = a.N
    offset = FB * (k * a.D + d0) * N
    load_tile(p_A, a.A + offset, m, N, LOG2E)
    v_max = splat(0.0)
    for n in range(N):
        v_a = load(p_A + VB * n)
        v_max = maximum(v_max, maximum(v_a, neg(v_a)))
    store(p_amax, v_max)
    if a.const_b or a.const_c:
        for n in range(N):
            put(p_ones + FB * n, np.float32(1.0))
        fill_tile(p_wb, N, 1.0)
        fill_tile(p_wc, N, 1.0)
        if a.const_b:
            load_tile(p_wb, a.Bq + offset, m, N, 1.0)
        if a.const_c:
            load_tile(p_wc, a.Cq + offset, m, N, 1.0)


# ---- forward ----

ROW = 3 * VB  # delta, delta * u, <C, h>
O_DL, O_DU, O_Y = 0, VB, 2 * VB


def forward_scratch_bytes(N: int, slab: int) -> int:
    """Bytes of scratch memory of a forward task: rows of a chunk, a spare vector, ones, the tiles."""
    return CH * ROW + VB * (1 + N // LANES + 1) + slab * VB * (4 * N + 3)


@function
def fill_rows(a, rows, T, p_u, s_u, p_dt, s_dt, v_bias, m, p_amax, spare):
    """Writes delta and delta * u, clears <C, h>; returns whether 2^(delta A) needs no clamp in this chunk."""
    v_max = splat(0.0)
    for _ in range(T):
        v_u = load_row(p_u, m, spare)
        v_dl = step_size(a, p_dt, v_bias, m, spare)
        v_max = maximum(maximum(v_dl, neg(v_dl)), v_max)
        store(rows + O_DL, v_dl)
        store(rows + O_DU, mul(v_dl, v_u))
        store(rows + O_Y, splat(0.0))
        rows += ROW
        p_u += s_u
        p_dt += s_dt
    return all_at_most(mul(v_max, load(p_amax)), splat(-T_MIN))


@function
def scan_rows(rows, T, N, p_A, p_h, p_B, s_B, p_C, s_C):
    """The hot loop: h = 2^(delta A) h + delta u B,  y += C h.

    One state at a time: its h stays in registers through the chunk, y passes through the L1 cache. The exponents are
    known to need no clamp, which would be 2 of 16 operations.
    """
    for n in range(N):
        v_A = load(p_A + VB * n)
        v_h = load(p_h + VB * n)
        row, p_b, p_c = rows, p_B + FB * n, p_C + FB * n
        for _ in range(T):
            v_h = fma(exp2_tame(mul(load(row + O_DL), v_A)), v_h, mul(load(row + O_DU), broadcast(p_b)))
            store(row + O_Y, fma(v_h, broadcast(p_c), load(row + O_Y)))
            row += ROW
            p_b += s_B
            p_c += s_C
        store(p_h + VB * n, v_h)


@function
def scan_rows_any(rows, T, N, p_A, p_h, p_B, s_B, p_C, s_C, p_wb, p_wc, const_b, const_c):
    """As scan_rows, for any delta A and for constant B and C (lane weights)."""
    for n in range(N):
        v_A = load(p_A + VB * n)
        v_h = load(p_h + VB * n)
        row, p_b, p_c = rows, p_B + FB * n, p_C + FB * n
        for _ in range(T):
            v_b, v_c = broadcast(p_b), broadcast(p_c)
            if const_b:
                v_b = mul(v_b, load(p_wb + VB * n))
            if const_c:
                v_c = mul(v_c, load(p_wc + VB * n))
            v_h = fma(exp2(mul(load(row + O_DL), v_A)), v_h, mul(load(row + O_DU), v_b))
            store(row + O_Y, fma(v_h, v_c, load(row + O_Y)))
            row += ROW
            p_b += s_B
            p_c += s_C
        store(p_h + VB * n, v_h)


@function
def finish_rows(a, rows, T, first, last, p_u, s_u, p_out, s_out, p_z, s_z, v_skip, m, spare):
    """Adds D * u (last: its size would cost the small terms their digits) and the earlier direction; gates, scales."""
    v_scale = splat(a.scale)
    for _ in range(T):
        v_y = fma(v_skip, load_row(p_u, m, spare), load(rows + O_Y))
        if not first:
            v_y = add(v_y, load_row(p_out, m, spare))
        if last:
            if a.z:
                v_z = load_row(p_z, m, spare)
                v_y = mul(v_y, silu(v_z))
            v_y = mul(v_y, v_scale)
        store_row(p_out, v_y, m, spare)
        rows += ROW
        p_u += s_u
        p_out += s_out
        p_z += s_z


@function
def forward_slab(a, i_b, i_g, i_s, rows):
    """All directions of a.slab neighbouring tiles: the tiles inside a chunk, so that its pages are fetched once."""
    N, L, D, DG = a.N, a.L, a.D, a.D // a.G
    spare = rows + CH * ROW
    p_ones = spare + VB
    tile0 = p_ones + VB * (N // LANES + 1)
    tile_bytes = VB * (4 * N + 3)
    n_tiles = min(a.slab, (DG - i_s * a.slab * LANES + LANES - 1) // LANES)
    for k in range(a.K):
        token, sign = direction(a, k)
        s_u, s_dt, s_z, s_out = sign * a.u_l, sign * a.dt_l, sign * a.z_l, sign * FB * D
        s_B, s_C = sign * a.B_l, sign * a.C_l
        for i in range(n_tiles):
            tile = tile0 + i * tile_bytes
            o_g = (i_s * a.slab + i) * LANES
            d0, m = i_g * DG + o_g, min(LANES, DG - o_g)
            o_d = FB * (k * D + d0)
            load_weights(a, k, d0, m, tile, tile + 2 * VB * N, tile + 3 * VB * N, p_ones, tile + 4 * VB * N)
            fill_tile(tile + VB * N, N, 0.0)
            store(tile + VB * (4 * N + 1), load_row(a.skip + o_d, m, spare) if a.skip else splat(0.0))
            store(tile + VB * (4 * N + 2), load_row(a.bias + o_d, m, spare) if a.bias else splat(0.0))
        for i_c in range(a.chunks):
            T = min(CH, L - i_c * CH)
            l_first = token + sign * i_c * CH
            p_B = p_ones if a.const_b else a.Bq + k * a.B_k + i_b * a.B_b + l_first * a.B_l + i_g * a.B_g
            p_C = p_ones if a.const_c else a.Cq + k * a.C_k + i_b * a.C_b + l_first * a.C_l + i_g * a.C_g
            for i in range(n_tiles):
                tile = tile0 + i * tile_bytes
                o_g = (i_s * a.slab + i) * LANES
                d0, m = i_g * DG + o_g, min(LANES, DG - o_g)
                p_h, p_wb, p_wc, p_amax = tile + VB * N, tile + 2 * VB * N, tile + 3 * VB * N, tile + 4 * VB * N
                v_skip, v_bias = load(p_amax + VB), load(p_amax + 2 * VB)
                p_u = a.u + k * a.u_k + i_b * a.u_b + l_first * a.u_l + FB * d0
                p_dt = a.dt + k * a.dt_k + i_b * a.dt_b + l_first * a.dt_l + FB * d0
                p_z = a.z + i_b * a.z_b + l_first * a.z_l + FB * d0
                p_out = a.out + FB * ((i_b * L + l_first) * D + d0)
                tame = fill_rows(a, rows, T, p_u, s_u, p_dt, s_dt, v_bias, m, p_amax, spare)
                if a.save:
                    p_state = a.states + FB * (((k * a.B + i_b) * a.chunks + i_c) * N * D + d0)
                    for n in range(N):
                        store_row(p_state + FB * D * n, load(p_h + VB * n), m, spare)
                if tame and not a.const_b and not a.const_c:
                    scan_rows(rows, T, N, tile, p_h, p_B, s_B, p_C, s_C)
                else:
                    scan_rows_any(rows, T, N, tile, p_h, p_B, s_B, p_C, s_C, p_wb, p_wc, a.const_b, a.const_c)
                finish_rows(a, rows, T, k == 0, k == a.K - 1, p_u, s_u, p_out, s_out, p_z, s_z, v_skip, m, spare)
        for i in range(n_tiles):
            o_g = (i_s * a.slab + i) * LANES
            o_d = (k * a.B + i_b) * D + i_g * DG + o_g
            store_tile(a.last + FB * o_d * N, tile0 + i * tile_bytes + VB * N, min(LANES, DG - o_g), N, 1.0)


def make_forward(stamp):
    """Makes the forward worker; ``stamp`` becomes part of the key under which Numba caches it."""

    def forward(params):
        """A worker: takes slabs until none is left."""
        a, counters = carray(params, 1)[0], address_of(params)
        scratch = a.scratch + take_ticket(counters + 8) * a.scratch_bytes
        slabs = (a.D // a.G + a.slab * LANES - 1) // (a.slab * LANES)
        while stamp:  # never 0
            task = take_ticket(counters)
            if task >= a.n_tasks:
                break
            forward_slab(a, task // (a.G * slabs), task // slabs % a.G, task % slabs, scratch)

    return forward


# ---- backward ----

B_ROW = 7 * VB  # delta, delta * u, gated dout, y, sum of g B, sum of q A, d delta / d dt
B_DL, B_DU, B_DY, B_Y, B_GB, B_QA, B_SIG = (VB * i for i in range(7))


def backward_scratch_bytes(N: int) -> int:
    """Bytes of scratch memory of a backward task: rows, states and decays of a chunk, dB and dC, the tiles, ones."""
    rows = CH * B_ROW + 2 * (CH + 1) * VB + 2 * CH * N * HB
    tiles = SLAB * (7 * N + 5) * VB
    return rows + tiles + VB * (N // LANES + 4)


@function
def fill_rows_backward(a, rows, T, p_u, s_u, p_dt, s_dt, p_g, s_g, p_z, s_z, v_bias, m, p_amax, spare):
    """Writes delta, delta * u, the gradient of y and d delta / d dt; clears the sums. Returns as fill_rows."""
    v_max = splat(0.0)
    v_scale = splat(a.scale)
    for _ in range(T):
        v_u = load_row(p_u, m, spare)
        v_x = add(load_row(p_dt, m, spare), v_bias)
        v_dl, v_sig = v_x, splat(1.0)
        if a.softplus:
            v_dl, v_sig = softplus(v_x), sigmoid(v_x)
        v_max = maximum(maximum(v_dl, neg(v_dl)), v_max)
        v_dy = mul(load_row(p_g, m, spare), v_scale)
        if a.z:
            v_z = load_row(p_z, m, spare)
            v_dy = mul(v_dy, silu(v_z))
        store(rows + B_DL, v_dl)
        store(rows + B_DU, mul(v_dl, v_u))
        store(rows + B_DY, v_dy)
        store(rows + B_Y, splat(0.0))
        store(rows + B_GB, splat(0.0))
        store(rows + B_QA, splat(0.0))
        store(rows + B_SIG, v_sig)
        rows += B_ROW
        p_u += s_u
        p_dt += s_dt
        p_g += s_g
        p_z += s_z
    return all_at_most(mul(v_max, load(p_amax)), splat(-T_MIN))


@function
def sweep_rows(rows, T, N, p_A, p_h0, s_h0, m, p_g, p_dA, p_hs, p_es, p_dB, p_dC, p_B, s_B, p_C, s_C, spare):
    """One chunk, one state after the other: states forward into scratch, then gradients backward.

    States and decays of the chunk are kept, so nothing is ever divided by a decay. dB and dC are sums over channels:
    tiles add to half a vector a step, whose lanes are added once all tiles of the slab are through.
    """
    for n in range(N):
        v_A = load(p_A + VB * n)
        v_h = load_row(p_h0 + s_h0 * n, m, spare)
        row, p_b, p_c, hs, es = rows, p_B + FB * n, p_C + FB * n, p_hs, p_es
        store(hs, v_h)
        for _ in range(T):
            v_e = exp2_tame(mul(load(row + B_DL), v_A))
            v_h = fma(v_e, v_h, mul(load(row + B_DU), broadcast(p_b)))
            hs += VB
            store(es, v_e)
            store(hs, v_h)
            store(row + B_Y, fma(v_h, broadcast(p_c), load(row + B_Y)))
            es += VB
            row += B_ROW
            p_b += s_B
            p_c += s_C
        v_g = load(p_g + VB * n)
        v_dA = splat(0.0)  # sums over many steps go chunk by chunk, which keeps their rounding small
        dB, dC = p_dB + HB * (n * CH + T), p_dC + HB * (n * CH + T)
        for _ in range(T):
            row -= B_ROW
            p_b -= s_B
            p_c -= s_C
            es -= VB
            dB -= HB
            dC -= HB
            v_dy = load(row + B_DY)
            v_g = fma(v_dy, broadcast(p_c), v_g)
            store_half(dC, add(load_half(dC), fold(mul(v_dy, load(hs)))))
            hs -= VB
            store_half(dB, add(load_half(dB), fold(mul(v_g, load(row + B_DU)))))
            store(row + B_GB, fma(v_g, broadcast(p_b), load(row + B_GB)))
            v_q = mul(mul(v_g, load(hs)), load(es))  # v_g times a growing decay may overflow before the state of 0
            v_g = mul(v_g, load(es))
            v_dA = fma(v_q, load(row + B_DL), v_dA)
            store(row + B_QA, fma(v_q, v_A, load(row + B_QA)))
        store(p_g + VB * n, v_g)
        store(p_dA + VB * n, add(load(p_dA + VB * n), v_dA))


@function
def sweep_rows_any(
    rows, T, N, p_A, p_h0, s_h0, m, p_g, p_dA, p_hs, p_es, p_dB, p_dC, p_B, s_B, p_C, s_C, spare,
    p_wb, p_wc, p_dwb, p_dwc,
):  # fmt: skip
    """As sweep_rows, for any delta A and for constant B and C, whose gradients stay in lanes."""
    for n in range(N):
        v_A, v_wb, v_wc = load(p_A + VB * n), load(p_wb + VB * n), load(p_wc + VB * n)
        v_h = load_row(p_h0 + s_h0 * n, m, spare)
        row, p_b, p_c, hs, es = rows, p_B + FB * n, p_C + FB * n, p_hs, p_es
        store(hs, v_h)
        for _ in range(T):
            v_e = exp2(mul(load(row + B_DL), v_A))
            v_h = fma(v_e, v_h, mul(load(row + B_DU), mul(broadcast(p_b), v_wb)))
            hs += VB
            store(es, v_e)
            store(hs, v_h)
            store(row + B_Y, fma(v_h, mul(broadcast(p_c), v_wc), load(row + B_Y)))
            es += VB
            row += B_ROW
            p_b += s_B
            p_c += s_C
        v_g = load(p_g + VB * n)
        v_dA, v_dwb, v_dwc = splat(0.0), splat(0.0), splat(0.0)
        dB, dC = p_dB + HB * (n * CH + T), p_dC + HB * (n * CH + T)
        for _ in range(T):
            row -= B_ROW
            p_b -= s_B
            p_c -= s_C
            es -= VB
            dB -= HB
            dC -= HB
            v_dy, v_b, v_c = load(row + B_DY), broadcast(p_b), broadcast(p_c)
            v_g = fma(v_dy, mul(v_c, v_wc), v_g)
            v_dc = mul(v_dy, load(hs))
            v_dwc = fma(v_dc, v_c, v_dwc)
            store_half(dC, add(load_half(dC), fold(mul(v_dc, v_wc))))
            hs -= VB
            v_db = mul(v_g, load(row + B_DU))
            v_dwb = fma(v_db, v_b, v_dwb)
            store_half(dB, add(load_half(dB), fold(mul(v_db, v_wb))))
            store(row + B_GB, fma(v_g, mul(v_b, v_wb), load(row + B_GB)))
            v_q = mul(mul(v_g, load(hs)), load(es))  # v_g times a growing decay may overflow before the state of 0
            v_g = mul(v_g, load(es))
            v_dA = fma(v_q, load(row + B_DL), v_dA)
            store(row + B_QA, fma(v_q, v_A, load(row + B_QA)))
        store(p_g + VB * n, v_g)
        store(p_dA + VB * n, add(load(p_dA + VB * n), v_dA))
        store(p_dwb + VB * n, add(load(p_dwb + VB * n), v_dwb))
        store(p_dwc + VB * n, add(load(p_dwc + VB * n), v_dwc))


@function
def finish_rows_backward(a, rows, T, first, k_row, s_row, p_u, s_u, p_g, s_g, p_z, s_z, o_z, v_skip, m, p_sums, spare):
    """Gradients of u, dt and z of one chunk; adds those of D and dt_bias to the sums."""
    v_dskip, v_dbias = splat(0.0), splat(0.0)
    v_scale = splat(a.scale)
    for _ in range(T):
        v_u, v_dy, v_gb = load_row(p_u, m, spare), load(rows + B_DY), load(rows + B_GB)
        v_ddl = fma(load(rows + B_QA), splat(LN2), mul(v_gb, v_u))
        v_ddt = mul(v_ddl, load(rows + B_SIG))
        v_dskip = fma(v_dy, v_u, v_dskip)
        v_dbias = add(v_dbias, v_ddt)
        store_row(a.du + k_row, fma(v_gb, load(rows + B_DL), mul(v_dy, v_skip)), m, spare)
        store_row(a.ddt + k_row, v_ddt, m, spare)
        if a.z:
            v_z = load_row(p_z, m, spare)
            v_y = fma(v_skip, v_u, load(rows + B_Y))
            v_dz = mul(mul(mul(load_row(p_g, m, spare), v_scale), v_y), silu_slope(v_z))
            if not first:
                v_dz = add(v_dz, load_row(a.dz + o_z, m, spare))
            store_row(a.dz + o_z, v_dz, m, spare)
        rows += B_ROW
        k_row += s_row
        o_z += s_row
        p_u += s_u
        p_g += s_g
        p_z += s_z
    store(p_sums, add(load(p_sums), v_dskip))
    store(p_sums + VB, add(load(p_sums + VB), v_dbias))


@function
def backward_slab(a, i_b, i_g, i_s, rows):
    """All directions of SLAB neighbouring tiles: chunks from the last step to the first, the tiles inside a chunk."""
    N, L, D = a.N, a.L, a.D
    DG = D // a.G
    p_hs = rows + CH * B_ROW
    p_es = p_hs + (CH + 1) * VB
    p_dB = p_es + (CH + 1) * VB
    p_dC = p_dB + CH * N * HB
    tile0 = p_dC + CH * N * HB
    tile_bytes = (7 * N + 5) * VB
    spare = tile0 + SLAB * tile_bytes
    p_ones = spare + VB
    plain = not a.const_b and not a.const_c
    n_tiles = min(SLAB, (DG - i_s * SLAB * LANES + LANES - 1) // LANES)
    for k in range(a.K):
        token, sign = direction(a, k)
        for i in range(n_tiles):
            tile = tile0 + i * tile_bytes
            d0 = i_g * DG + (i_s * SLAB + i) * LANES
            m = min(LANES, DG - (i_s * SLAB + i) * LANES)
            p_A = tile
            load_weights(a, k, d0, m, p_A, tile + VB * N, tile + 2 * VB * N, p_ones, tile + 7 * N * VB)
            fill_tile(tile + 3 * VB * N, 4 * N, 0.0)
            if a.dlast:
                load_tile(tile + 3 * VB * N, a.dlast + FB * ((k * a.B + i_b) * D + d0) * N, m, N, 1.0)
            fill_tile(tile + (7 * N + 1) * VB, 2, 0.0)
            o_d = FB * (k * D + d0)
            store(tile + (7 * N + 3) * VB, load_row(a.skip + o_d, m, spare) if a.skip else splat(0.0))
            store(tile + (7 * N + 4) * VB, load_row(a.bias + o_d, m, spare) if a.bias else splat(0.0))
        for i_c in range(a.chunks - 1, -1, -1):
            l0 = i_c * CH
            T = min(CH, L - l0)
            l_first = token + sign * l0
            s_u, s_dt, s_z, s_row = sign * a.u_l, sign * a.dt_l, sign * a.z_l, sign * FB * D
            s_B, s_C = sign * a.B_l, sign * a.C_l
            p_B = p_ones if a.const_b else a.Bq + k * a.B_k + i_b * a.B_b + l_first * a.B_l + i_g * a.B_g
            p_C = p_ones if a.const_c else a.Cq + k * a.C_k + i_b * a.C_b + l_first * a.C_l + i_g * a.C_g
            fill_tile(p_dB, CH * N, 0.0)
            for i in range(n_tiles):
                tile = tile0 + i * tile_bytes
                d0 = i_g * DG + (i_s * SLAB + i) * LANES
                m = min(LANES, DG - (i_s * SLAB + i) * LANES)
                p_wb, p_wc, p_g, p_dA = tile + VB * N, tile + 2 * VB * N, tile + 3 * VB * N, tile + 4 * VB * N
                p_dwb, p_dwc = tile + 5 * VB * N, tile + 6 * VB * N
                p_amax, p_sums = tile + 7 * N * VB, tile + (7 * N + 1) * VB
                v_skip, v_bias = load(tile + (7 * N + 3) * VB), load(tile + (7 * N + 4) * VB)
                p_u = a.u + k * a.u_k + i_b * a.u_b + l_first * a.u_l + FB * d0
                p_dt = a.dt + k * a.dt_k + i_b * a.dt_b + l_first * a.dt_l + FB * d0
                p_z = a.z + i_b * a.z_b + l_first * a.z_l + FB * d0
                o_z = FB * ((i_b * L + l_first) * D + d0)
                o_k = FB * (((k * a.B + i_b) * L + l_first) * D + d0)
                p_go = a.dout + o_z
                tame = fill_rows_backward(
                    a, rows, T, p_u, s_u, p_dt, s_dt, p_go, s_row, p_z, s_z, v_bias, m, p_amax, spare
                )
                p_h0 = a.states + FB * (((k * a.B + i_b) * a.chunks + i_c) * N * D + d0)
                if tame and plain:
                    sweep_rows(
                        rows, T, N, tile, p_h0, FB * D, m, p_g, p_dA, p_hs, p_es, p_dB, p_dC,
                        p_B, s_B, p_C, s_C, spare,
                    )  # fmt: skip
                else:
                    if plain:
                        fill_tile(p_wb, 2 * N, 1.0)
                    sweep_rows_any(
                        rows, T, N, tile, p_h0, FB * D, m, p_g, p_dA, p_hs, p_es, p_dB, p_dC,
                        p_B, s_B, p_C, s_C, spare, p_wb, p_wc, p_dwb, p_dwc,
                    )  # fmt: skip
                finish_rows_backward(
                    a, rows, T, k == 0, o_k, s_row, p_u, s_u, p_go, s_row, p_z, s_z, o_z, v_skip, m, p_sums, spare
                )
            o_l = FB * N * (((k * a.B + i_b) * L + l_first) * a.G + i_g) + i_s * a.slab_bytes
            for t in range(T):
                for n in range(N):
                    o = o_l + FB * (sign * t * a.G * N + n)
                    if not a.const_b:
                        put(a.dB + o, half_sum(load_half(p_dB + HB * (n * CH + t))))
                    if not a.const_c:
                        put(a.dC + o, half_sum(load_half(p_dC + HB * (n * CH + t))))
        for i in range(n_tiles):
            tile = tile0 + i * tile_bytes
            d0 = i_g * DG + (i_s * SLAB + i) * LANES
            m = min(LANES, DG - (i_s * SLAB + i) * LANES)
            o_d = FB * ((i_b * a.K + k) * D + d0)
            store_tile(a.dA + o_d * N, tile + 4 * VB * N, m, N, 1.0)
            if a.const_b:
                store_tile(a.dB_const + o_d * N, tile + 5 * VB * N, m, N, 1.0)
            if a.const_c:
                store_tile(a.dC_const + o_d * N, tile + 6 * VB * N, m, N, 1.0)
            p_sums = tile + (7 * N + 1) * VB
            store_row(a.dskip + o_d, load(p_sums), m, spare)
            store_row(a.dbias + o_d, load(p_sums + VB), m, spare)


def make_backward(stamp):
    """Makes the backward worker; ``stamp`` as in :func:`make_forward`."""

    def backward(params):
        """A worker: takes slabs until none is left."""
        a, counters = carray(params, 1)[0], address_of(params)
        scratch = a.scratch + take_ticket(counters + 8) * a.scratch_bytes
        slabs = (a.D // a.G + SLAB * LANES - 1) // (SLAB * LANES)
        while stamp:  # never 0
            task = take_ticket(counters)
            if task >= a.n_tasks:
                break
            backward_slab(a, task // (a.G * slabs), task // slabs % a.G, task % slabs, scratch)

    return backward


forward = Worker(make_forward, PARAMS)
backward = Worker(make_backward, PARAMS)
