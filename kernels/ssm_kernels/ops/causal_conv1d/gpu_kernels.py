"""Triton kernels of the depthwise convolution, forward and backward.

One program holds a tile of BD channels, two to a lane, and walks along CH tokens, so that every row of x is read and
widened once and serves all taps of both directions from registers. A result at token l reads the H rows from l - LEFT
on, its window; direction k takes the W rows of it from k (H - W) on. In the backward pass a gradient at token l reaches
the same H rows. What comes before activation is computed anew from x there.

Gradients of the parameters are sums over tokens: every program stores those of its own tokens, and the caller adds them
up in a fixed order, so two runs give the same bits.
"""

# K directions (1 or 2), B batch, L tokens, D channels, W width

from __future__ import annotations

from typing import NamedTuple

import triton
import triton.language as tl

from ...triton_utils import sigmoid, zero_rows


class Shape(NamedTuple):
    """What a kernel is compiled for."""

    K: int
    D: int
    W: int
    H: int
    LEFT: int
    BACKWARDS: bool  # K = 1: the first tap belongs to the last row of the window, as in direction 1 of 2
    BD: int
    S_X: int  # elements from one token to the next
    HAS_BIAS: bool
    SILU: bool
    FAST: bool  # NVIDIA's approximate instructions


@triton.jit
def work_of_program(L, CH, n_chunks, F: tl.constexpr):
    """Channels and their mask, batch element, chunk, its first token and how many it has."""
    n_tiles: tl.constexpr = (F.D + F.BD - 1) // F.BD
    pid = tl.program_id(0)
    o_d = pid % n_tiles * F.BD + tl.arange(0, F.BD)
    if F.D % F.BD == 0:
        m_d = tl.full([F.BD], True, tl.int1)
    else:
        m_d = o_d < F.D
    i_c = pid // n_tiles % n_chunks
    i_b = (pid // n_tiles // n_chunks).to(tl.int64)
    return o_d, m_d, i_b, i_c, i_c * CH, tl.minimum(CH, L - i_c * CH)


@triton.jit
def within(i, first, end, m_d):
    """m_d where first <= i < end, else nothing."""
    o = tl.full(m_d.shape, i, tl.int32)  # the interpreter takes no scalar into a mask
    return m_d & (o >= first) & (o < end)


@triton.jit
def load_row(p, i, L, m_d):
    """Row i as float32, zero before the first and behind the last token."""
    return tl.load(p, mask=within(i, 0, L, m_d), other=0.0).to(tl.float32)


@triton.jit
def first_window(p_x, i_0, L, m_d, F: tl.constexpr):
    """The H - 1 rows that the window of token i_0 shares with that of the token before it."""
    H: tl.constexpr = F.H
    window = ()
    for i in tl.static_range(H - 1):
        window = window + (load_row(p_x + (i - F.LEFT) * F.S_X, i_0 + (i - F.LEFT), L, m_d),)
    return window


@triton.jit
def load_taps(weight, s_w, o_d, m_d, F: tl.constexpr):
    """K * W vectors in the order of the window's rows."""
    K: tl.constexpr = F.K
    W: tl.constexpr = F.W
    taps = ()
    for k in tl.static_range(K):
        for t in tl.static_range(W):
            j = F.W - 1 - t if F.BACKWARDS or k == 1 else t
            p = weight + k * s_w[0] + o_d * s_w[1] + j * s_w[2]
            taps = taps + (tl.load(p, mask=m_d, other=0.0).to(tl.float32),)
    return taps


@triton.jit
def load_bias(bias, s_bias, o_d, m_d, F: tl.constexpr):
    """K vectors; zeros where there is no bias."""
    K: tl.constexpr = F.K
    rows = ()
    for k in tl.static_range(K):
        if F.HAS_BIAS:
            rows = rows + (tl.load(bias + k * s_bias[0] + o_d * s_bias[1], mask=m_d, other=0.0).to(tl.float32),)
        else:
            rows = rows + zero_rows(1, F.BD)
    return rows


@triton.jit
def last_rows(rows, N: tl.constexpr, SKIP: tl.constexpr):
    """The N rows behind the first SKIP ones."""
    kept = ()
    for i in tl.static_range(N):
        kept = kept + (rows[SKIP + i],)
    return kept


@triton.jit
def before_activation(rows, taps, b_bias, u, k, F: tl.constexpr):
    """bias + sum_t taps[t] rows[t] for direction k, where the window starts at rows[u]."""
    W: tl.constexpr = F.W
    b_a = b_bias[k]
    for t in tl.static_range(W):
        b_a += taps[k * F.W + t] * rows[u + k * (F.H - F.W) + t]
    return b_a


@triton.jit(do_not_specialize=['NB', 'L', 'CH', 'n_chunks'])
def conv_forward_kernel(
    x, weight, bias, y, NB, L, CH, n_chunks, s_x, s_w, s_bias, F: tl.constexpr, U: tl.constexpr
):  # fmt: skip
    """U tokens a turn: their loads are in flight together, and all stores come after them."""
    K: tl.constexpr = F.K
    o_d, m_d, i_b, _, i_0, n_rows = work_of_program(L, CH, n_chunks, F)
    RIGHT: tl.constexpr = F.H - 1 - F.LEFT
    taps = load_taps(weight, s_w, o_d, m_d, F)
    b_bias = load_bias(bias, s_bias, o_d, m_d, F)
    p_x = x + i_b * s_x + i_0.to(tl.int64) * F.S_X + o_d
    p_y = y + (i_b * L + i_0) * F.D + o_d
    s_k = NB.to(tl.int64) * L * F.D
    window = first_window(p_x, i_0, L, m_d, F)
    for i in range(0, n_rows, U):
        rows = window
        for u in tl.static_range(U):
            rows = rows + (load_row(p_x + (u + RIGHT) * F.S_X, i_0 + i + (u + RIGHT), L, m_d),)
        ys = ()
        for u in tl.static_range(U):
            for k in tl.static_range(K):
                b_y = before_activation(rows, taps, b_bias, u, k, F)
                if F.SILU:
                    b_y *= sigmoid(b_y, F.FAST)
                ys = ys + (b_y,)
        for u in tl.static_range(U):
            for k in tl.static_range(K):
                b_y = ys[u * F.K + k].to(y.dtype.element_ty)
                tl.store(p_y + k * s_k + u * F.D, b_y, mask=within(i + u, 0, n_rows, m_d))
        window = last_rows(rows, F.H - 1, U)
        p_x += U * F.S_X
        p_y += U * F.D


@triton.jit
def add_to_reached(b_dx, taps, b_g, u, k, N: tl.constexpr, F: tl.constexpr):
    """Adds the gradient at a result of direction k to those of the W of N rows that it was computed from."""
    new_dx = ()
    for r in tl.static_range(N):
        if r >= u + k * (F.H - F.W) and r < u + k * (F.H - F.W) + F.W:
            new_dx = new_dx + (b_dx[r] + taps[k * F.W + r - u - k * (F.H - F.W)] * b_g,)
        else:
            new_dx = new_dx + (b_dx[r],)
    return new_dx


@triton.jit
def add_to_weights(dw, dbias, rows, own, u, k, F: tl.constexpr):
    """Adds the gradient at a result of direction k to those of its weights and bias."""
    K: tl.constexpr = F.K
    W: tl.constexpr = F.W
    new_dw = ()
    new_dbias = ()
    for q in tl.static_range(K):
        for t in tl.static_range(W):
            if q == k:
                new_dw = new_dw + (dw[q * F.W + t] + own * rows[u + k * (F.H - F.W) + t],)
            else:
                new_dw = new_dw + (dw[q * F.W + t],)
        new_dbias = new_dbias + (dbias[q] + own if q == k else dbias[q],)
    return new_dw, new_dbias


@triton.jit(do_not_specialize=['NB', 'L', 'CH', 'n_chunks'])
def conv_backward_kernel(
    x, weight, bias, dy, dx, parts, NB, L, CH, n_chunks, s_x, s_w, s_bias, s_dy, S_DY: tl.constexpr,
    F: tl.constexpr, U: tl.constexpr,
):  # fmt: skip
    """Walks H - 1 tokens more than the chunk has: gradients from beyond its ends reach rows of x inside."""
    H: tl.constexpr = F.H
    K: tl.constexpr = F.K
    W: tl.constexpr = F.W
    o_d, m_d, i_b, i_c, i_0, n_rows = work_of_program(L, CH, n_chunks, F)
    RIGHT: tl.constexpr = F.H - 1 - F.LEFT
    taps = load_taps(weight, s_w, o_d, m_d, F)
    b_bias = load_bias(bias, s_bias, o_d, m_d, F)
    i_0 -= RIGHT
    p_x = x + i_b * s_x + i_0.to(tl.int64) * F.S_X + o_d
    p_dy = dy + i_b * s_dy[1] + i_0.to(tl.int64) * S_DY + o_d
    p_dx = dx + (i_b * L + i_0 - F.LEFT) * F.D + o_d
    window = first_window(p_x, i_0, L, m_d, F)
    reached = zero_rows(F.H - 1, F.BD)  # gradients of the window's rows, as far as tokens were visited
    dw = zero_rows(F.K * F.W, F.BD)
    dbias = zero_rows(F.K, F.BD)
    for i in range(0, n_rows + (F.H - 1), U):
        rows = window
        gs = ()
        for u in tl.static_range(U):
            rows = rows + (load_row(p_x + (u + RIGHT) * F.S_X, i_0 + i + (u + RIGHT), L, m_d),)
            for k in tl.static_range(K):
                gs = gs + (load_row(p_dy + k * s_dy[0] + u * S_DY, i_0 + i + u, L, m_d),)
        b_dx = reached + zero_rows(U, F.BD)
        for u in tl.static_range(U):
            inside = within(i + u, RIGHT, RIGHT + n_rows, m_d)
            for k in tl.static_range(K):
                b_g = gs[u * F.K + k]
                if F.SILU:
                    b_a = before_activation(rows, taps, b_bias, u, k, F)
                    b_sig = sigmoid(b_a, F.FAST)
                    b_g *= b_sig * (1.0 + b_a * (1.0 - b_sig))
                own = tl.where(inside, b_g, 0.0)
                b_dx = add_to_reached(b_dx, taps, b_g, u, k, H - 1 + U, F)
                dw, dbias = add_to_weights(dw, dbias, rows, own, u, k, F)
        for u in tl.static_range(U):
            m = within(i + u, F.H - 1, F.H - 1 + n_rows, m_d)
            tl.store(p_dx + u * F.D, b_dx[u].to(dx.dtype.element_ty), mask=m)
        window = last_rows(rows, F.H - 1, U)
        reached = last_rows(b_dx, F.H - 1, U)
        p_x += U * F.S_X
        p_dy += U * S_DY
        p_dx += U * F.D
    n_sums: tl.constexpr = F.W + F.HAS_BIAS
    for k in tl.static_range(K):
        p_part = parts + ((k * NB.to(tl.int64) + i_b) * n_chunks + i_c) * n_sums * F.D + o_d
        for t in tl.static_range(W):
            j = F.W - 1 - t if F.BACKWARDS or k == 1 else t
            tl.store(p_part + j * F.D, dw[k * F.W + t], mask=m_d)
        if F.HAS_BIAS:
            tl.store(p_part + F.W * F.D, dbias[k], mask=m_d)
