"""Triton kernels of the selective scan, forward.

The recurrence is that of Mamba, arXiv 2312.00752, algorithm 2. One program holds a tile of BD channels, one or two to a
lane, and walks along the tokens with the states of its channels in registers: a tuple of N vectors, because a tile
[N, BD] would be spread over the lanes and cost shuffles in every step. Tokens are cut into chunks of R blocks of CB:

1. ``chunk_state_kernel``: the state in which each chunk ends if it starts from zero, and the sum of its step sizes;
2. ``pass_state_kernel``: from those the state in which each chunk starts; a whole chunk decays by exp(A sum(delta));
3. ``scan_forward_kernel``: every chunk from its true start, with outputs.

Where one chunk per sequence fills the device, step 3 runs alone. The scan from the last token to the first is the same
code with row strides negated, so nothing is flipped. One program of step 3 runs both directions of its chunk, one
after the other, and thus adds them and applies the gate without a further kernel.
"""

# K directions (1 or 2), B batch, L tokens, D channels, N state size, G groups of DG channels, T tiles of BD channels

from __future__ import annotations

from typing import NamedTuple

import triton
import triton.language as tl

from ...triton_utils import LOG2E, exp2, join_columns, scalar_row, sigmoid, softplus, split_columns, zero_rows


class Shape(NamedTuple):
    """What a kernel is compiled for."""

    K: int
    D: int
    N: int
    G: int
    DG: int
    BD: int
    T: int
    PACK_B: int  # values by one load, see scalar_row; 0: constant over the tokens
    PACK_C: int
    HAS_D: bool
    HAS_Z: bool
    HAS_BIAS: bool
    SOFTPLUS: bool
    REVERSE: bool  # direction of K = 1
    FAST: bool  # NVIDIA's approximate instructions


class RowStrides(NamedTuple):
    """Elements from one token to the next: compiled in, so that they become offsets inside load instructions."""

    u: int
    dt: int
    z: int
    B: int
    C: int
    dy: int


@triton.jit
def tile_of_channels(i_t, F: tl.constexpr):
    """Group, channels and mask of tile i_t. A tile never holds channels of two groups, so its B and C are scalars."""
    o_d = tl.arange(0, F.BD)
    if F.DG % F.BD == 0:  # no mask then: the compiler drops all comparisons
        m_d = tl.full([F.BD], True, tl.int1)
        i_g = i_t * F.BD // F.DG
        o_d += i_t * F.BD
    else:
        i_g = i_t // (F.T // F.G)
        o_d += i_t % (F.T // F.G) * F.BD
        m_d = o_d < F.DG
        o_d += i_g * F.DG
    return i_g, o_d, m_d


@triton.jit
def load_float(p, m_d):
    """A vector as float32, zero where the mask is off."""
    return tl.load(p, mask=m_d, other=0.0).to(tl.float32)


@triton.jit
def load_rows(p, s_d, s_n, o_d, m_d, F: tl.constexpr):
    """N vectors of channels from a matrix (D, N) with these strides."""
    W: tl.constexpr = triton.next_power_of_2(F.N)  # tiles need powers of 2; split_columns drops what is too much
    o_n = tl.arange(0, W)
    m = m_d[:, None] & (o_n < F.N)[None, :]
    tile = tl.load(p + o_d[:, None] * s_d + o_n[None, :] * s_n, mask=m, other=0.0).to(tl.float32)
    return split_columns(tile, F.N, W)


@triton.jit
def store_rows(p, rows, o_d, m_d, F: tl.constexpr):
    """Writes N vectors of channels to a contiguous matrix (D, N)."""
    W: tl.constexpr = triton.next_power_of_2(F.N)
    o_n = tl.arange(0, W)
    tile = join_columns(rows, 0, 1, F.N, W)
    tl.store(p + o_d[:, None] * F.N + o_n[None, :], tile, mask=m_d[:, None] & (o_n < F.N)[None, :])


@triton.jit
def decay_rows(p, s_d, s_n, o_d, m_d, F: tl.constexpr):
    """The columns of A times log2(e): exp(x A) = 2^(x result)."""
    N: tl.constexpr = F.N
    rows = ()
    columns = load_rows(p, s_d, s_n, o_d, m_d, F)
    for n in tl.static_range(N):
        rows = rows + (columns[n] * LOG2E,)  # once a chunk, so that a step needs one instruction, 2^x, for its decay
    return rows


@triton.jit
def token_row(p, o_d, m_d, PACK: tl.constexpr, F: tl.constexpr):
    """B or C of one token: N scalars shared by the tile; if constant over the tokens, N rows of a (N, D) matrix."""
    N: tl.constexpr = F.N
    if PACK == 0:
        rows = ()
        for n in tl.static_range(N):
            rows = rows + (load_float(p + n * F.D + o_d, m_d),)
        return rows
    else:
        return scalar_row(p, F.N, PACK)


@triton.jit
def step_size(p, b_bias, m_d, F: tl.constexpr):
    """delta of a tile at one token, in float32."""
    b_dl = load_float(p, m_d)
    if F.HAS_BIAS:
        b_dl += b_bias
    if F.SOFTPLUS:
        b_dl = softplus(b_dl, F.FAST)
    return b_dl


@triton.jit
def walks_left(i_k, ADJOINT: tl.constexpr, F: tl.constexpr):
    """1 if direction i_k goes from the last token to the first, else 0; its ADJOINT goes the other way."""
    if F.K == 1:
        left = i_k * 0 + F.REVERSE
    else:
        left = i_k
    if ADJOINT:
        left = 1 - left
    return left


@triton.jit
def state_steps(
    h, b_sum, b_A, b_bias, p_x, p_dt, p_z, p_R, scale, i, o_d, m_d, STEPS: tl.constexpr, RIGHT: tl.constexpr,
    S_x: tl.constexpr, S_R: tl.constexpr, PACK: tl.constexpr, ADJOINT: tl.constexpr, S: tl.constexpr, F: tl.constexpr,
):  # fmt: skip
    """STEPS tokens of step 1, unrolled: the states and the sum of delta after them."""
    N: tl.constexpr = F.N
    for j in tl.static_range(STEPS):
        o = (i + j) * RIGHT
        b_dl = step_size(p_dt + o * S.dt + o_d, b_bias, m_d, F)
        b_x = load_float(p_x + o * S_x + o_d, m_d)
        b_R = token_row(p_R + o * S_R, o_d, m_d, PACK, F)
        b_sum += b_dl
        new = ()
        if ADJOINT:  # g_l = o_l C_l + a_{l+1} g_{l+1}, kept as a_l g_l: so the decay comes last
            b_x *= scale
            if F.HAS_Z:
                b_z = load_float(p_z + o * S.z + o_d, m_d)
                b_x *= b_z * sigmoid(b_z, F.FAST)
            for n in tl.static_range(N):
                new = new + (exp2(b_dl * b_A[n], F.FAST) * (b_x * b_R[n] + h[n]),)
        else:
            b_x *= b_dl
            for n in tl.static_range(N):
                new = new + (exp2(b_dl * b_A[n], F.FAST) * h[n] + b_x * b_R[n],)
        h = new
    return h, b_sum


@triton.jit
def chunk_state(
    x, dt, A, R, z, bias, states, sums, scale, i_k, i_b, i_t, i_c, i_to, NB, L, CH, n_chunks, n_states,
    s_x, s_dt, s_A, s_R, s_z, s_bias, RIGHT: tl.constexpr, S_x: tl.constexpr, S_R: tl.constexpr, PACK: tl.constexpr,
    ADJOINT: tl.constexpr, S: tl.constexpr, F: tl.constexpr, U: tl.constexpr,
):  # fmt: skip
    """Step 1 for chunk i_c: its local end becomes state i_to, its sum of delta goes to ``sums``."""
    i_g, o_d, m_d = tile_of_channels(i_t, F)
    n_steps = tl.minimum(CH, L - i_c * CH).to(tl.int64)
    row = i_c.to(tl.int64) * CH + (0 if RIGHT == 1 else n_steps - 1)
    p_x = x + i_k * s_x[0] + i_b * s_x[1] + row * S_x
    p_dt = dt + i_k * s_dt[0] + i_b * s_dt[1] + row * S.dt
    p_R = R + i_k * s_R[0] + i_b * s_R[1] + i_g * s_R[2] + row * S_R
    p_z = p_x
    if ADJOINT and F.HAS_Z:
        p_z = z + i_b * s_z + row * S.z
    b_A = decay_rows(A + i_k * s_A[0], s_A[1], s_A[2], o_d, m_d, F)
    b_bias = 0.0
    if F.HAS_BIAS:
        b_bias = load_float(bias + i_k * s_bias + o_d, m_d)
    h = zero_rows(F.N, F.BD)
    BD: tl.constexpr = F.BD
    b_sum = tl.zeros([BD], tl.float32)
    # a loop of whole turns and a short one for the rest: masking tokens past the end would cost in every step
    n_unrolled = n_steps // U * U
    for i in range(0, n_unrolled, U):
        h, b_sum = state_steps(
            h, b_sum, b_A, b_bias, p_x, p_dt, p_z, p_R, scale, i, o_d, m_d, U, RIGHT, S_x, S_R, PACK, ADJOINT, S, F
        )  # fmt: skip
    if U > 1:
        for i in range(n_unrolled, n_steps):
            h, b_sum = state_steps(
                h, b_sum, b_A, b_bias, p_x, p_dt, p_z, p_R, scale, i, o_d, m_d, 1, RIGHT, S_x, S_R, PACK, ADJOINT, S, F
            )  # fmt: skip
    i_kb = i_k * NB + i_b
    store_rows(states + (i_kb * n_states + i_to) * F.N * F.D, h, o_d, m_d, F)
    tl.store(sums + (i_kb * n_chunks + i_c) * F.D + o_d, b_sum, mask=m_d)


@triton.jit(do_not_specialize=['NB', 'L', 'CH', 'R', 'n_chunks', 'n_states'])
def chunk_state_kernel(
    x, dt, A, R_, z, bias, states, sums, scale, NB, L, CH, R, n_chunks, n_states, s_x, s_dt, s_A, s_R, s_z, s_bias,
    S_x: tl.constexpr, S_R: tl.constexpr, PACK: tl.constexpr, ADJOINT: tl.constexpr, S: tl.constexpr, F: tl.constexpr,
    U: tl.constexpr,
):  # fmt: skip
    """Step 1. Chunk j (in the order of the walk) starts from zero; where it ends is stored as the start of chunk j + 1.

    ADJOINT: the same for the gradient of the state, which walks against the scan: x is the output gradient instead of
    u, R_ is C instead of B, and the decay comes after the input.
    """
    pid = tl.program_id(0)
    i_t = pid % F.T
    j = pid // F.T % (n_chunks - 1)
    i_kb = (pid // F.T // (n_chunks - 1)).to(tl.int64)
    i_k = i_kb // NB
    i_b = i_kb % NB
    # two copies of the code: with their signs compiled in, row strides are offsets inside load instructions
    if walks_left(i_k, ADJOINT, F) == 1:
        i_to = tl.minimum((n_chunks - 1 - j) * R, n_states) - 1
        chunk_state(
            x, dt, A, R_, z, bias, states, sums, scale, i_k, i_b, i_t, n_chunks - 1 - j, i_to, NB, L, CH, n_chunks,
            n_states, s_x, s_dt, s_A, s_R, s_z, s_bias, -1, S_x, S_R, PACK, ADJOINT, S, F, U,
        )  # fmt: skip
    else:
        chunk_state(
            x, dt, A, R_, z, bias, states, sums, scale, i_k, i_b, i_t, j, (j + 1) * R, NB, L, CH, n_chunks, n_states,
            s_x, s_dt, s_A, s_R, s_z, s_bias, 1, S_x, S_R, PACK, ADJOINT, S, F, U,
        )  # fmt: skip


@triton.jit(do_not_specialize=['NB', 'R', 'n_chunks', 'n_states'])
def pass_state_kernel(
    A, states, sums, init, NB, R, n_chunks, n_states, s_A, HAS_INIT: tl.constexpr, ADJOINT: tl.constexpr,
    F: tl.constexpr, BX: tl.constexpr, U: tl.constexpr,
):  # fmt: skip
    """Step 2, in place: the local ends of step 1 become true starts. A program takes BX of the D * N states."""
    n_tiles: tl.constexpr = (F.D * F.N + BX - 1) // BX
    pid = tl.program_id(0)
    i_kb = (pid // n_tiles).to(tl.int64)
    i_k = i_kb // NB
    o_x = pid % n_tiles * BX + tl.arange(0, BX)
    o_d = o_x // F.N
    m_x = o_x < F.D * F.N
    b_A = load_float(A + i_k * s_A[0] + o_d * s_A[1] + o_x % F.N * s_A[2], m_x) * LOG2E
    p_state = states + i_kb * n_states * F.D * F.N + o_x
    p_sum = sums + i_kb * n_chunks * F.D + o_d
    h = tl.zeros([BX], tl.float32)
    if HAS_INIT:
        h = load_float(init + i_kb * F.D * F.N + o_x, m_x)
    left = walks_left(i_k, ADJOINT, F)
    i_0 = left * (tl.minimum(n_chunks * R, n_states) - 1)
    tl.store(p_state + i_0 * F.N * F.D, h, mask=m_x)
    # U chunks a turn: their loads are in flight together before the chain of multiplications needs them
    for j in range(1, n_chunks, U):
        b_a = ()
        b_s = ()
        for i in tl.static_range(U):
            m = m_x & (tl.full([BX], j + i, tl.int32) < n_chunks)
            i_from = left * (n_chunks - 1) + (1 - 2 * left) * (j + i - 1)
            i_to = left * (n_chunks * R - 1) + (1 - 2 * left) * (j + i) * R
            b_a = b_a + (exp2(b_A * load_float(p_sum + i_from * F.D, m), F.FAST),)
            b_s = b_s + (load_float(p_state + i_to * F.N * F.D, m),)
        for i in tl.static_range(U):
            h = b_a[i] * h + b_s[i]
            m = m_x & (tl.full([BX], j + i, tl.int32) < n_chunks)
            i_to = left * (n_chunks * R - 1) + (1 - 2 * left) * (j + i) * R
            tl.store(p_state + i_to * F.N * F.D, h, mask=m)


@triton.jit
def scan_steps(
    h, b_A, b_D, b_bias, p_u, p_dt, p_z, p_B, p_C, p_y, p_acc, scale, i, o_d, m_d, STEPS: tl.constexpr,
    I_K: tl.constexpr, RIGHT: tl.constexpr, S: tl.constexpr, F: tl.constexpr,
):  # fmt: skip
    """STEPS tokens of step 3, unrolled, with their outputs: the states after them."""
    N: tl.constexpr = F.N
    ys = ()
    for j in tl.static_range(STEPS):
        o = (i + j) * RIGHT
        b_dl = step_size(p_dt + o * S.dt + o_d, b_bias, m_d, F)
        b_u = load_float(p_u + o * S.u + o_d, m_d)
        b_B = token_row(p_B + o * S.B, o_d, m_d, F.PACK_B, F)
        b_C = token_row(p_C + o * S.C, o_d, m_d, F.PACK_C, F)
        b_x = b_dl * b_u
        new = ()
        for n in tl.static_range(N):
            new = new + (exp2(b_dl * b_A[n], F.FAST) * h[n] + b_x * b_B[n],)
        h = new
        b_y = h[0] * b_C[0]
        for n in tl.static_range(1, N):
            b_y += h[n] * b_C[n]
        if F.HAS_D:  # after the sum over the states, whose small terms would lose digits beside it
            b_y += b_D * b_u
        if I_K > 0:
            b_y += tl.load(p_acc + o * F.D + o_d, mask=m_d, other=0.0)
        if I_K == F.K - 1:
            b_y *= scale
            if F.HAS_Z:
                b_z = load_float(p_z + o * S.z + o_d, m_d)
                b_y *= b_z * sigmoid(b_z, F.FAST)
        ys = ys + (b_y,)
    # stores come after all steps: no load of a later step has to wait for one that might alias
    for j in tl.static_range(STEPS):
        o = (i + j) * RIGHT * F.D
        if I_K == F.K - 1:
            tl.store(p_y + o + o_d, ys[j].to(p_y.dtype.element_ty), mask=m_d)
        else:
            tl.store(p_acc + o + o_d, ys[j], mask=m_d)
    return h


@triton.jit
def scan_direction(
    u, dt, A, B, C, D, z, bias, y, acc, states, last, scale, i_b, i_t, i_c, NB, L, CB, R, n_chunks, n_states,
    s_u, s_dt, s_A, s_B, s_C, s_D, s_z, s_bias, I_K: tl.constexpr, RIGHT: tl.constexpr, CHUNKED: tl.constexpr,
    SAVE: tl.constexpr, S: tl.constexpr, F: tl.constexpr, U: tl.constexpr,
):  # fmt: skip
    """Step 3 for direction I_K of chunk i_c, block by block."""
    i_g, o_d, m_d = tile_of_channels(i_t, F)
    n_blocks = tl.minimum(R, tl.cdiv(L, CB) - i_c * R).to(tl.int64)
    i_first = i_c * R + (0 if RIGHT == 1 else n_blocks - 1)
    row = (i_c * R * CB if RIGHT == 1 else tl.minimum((i_c + 1) * R * CB, L) - 1).to(tl.int64)
    p_u = u + I_K * s_u[0] + i_b * s_u[1] + row * S.u
    p_dt = dt + I_K * s_dt[0] + i_b * s_dt[1] + row * S.dt
    p_B = B + I_K * s_B[0] + i_b * s_B[1] + i_g * s_B[2] + row * S.B
    p_C = C + I_K * s_C[0] + i_b * s_C[1] + i_g * s_C[2] + row * S.C
    p_y = y + (i_b * L + row) * F.D
    p_acc = acc + (i_b * L + row) * F.D
    p_z = p_u
    if F.HAS_Z:
        p_z = z + i_b * s_z + row * S.z
    b_A = decay_rows(A + I_K * s_A[0], s_A[1], s_A[2], o_d, m_d, F)
    b_D = 0.0
    if F.HAS_D:
        b_D = load_float(D + I_K * s_D + o_d, m_d)
    b_bias = 0.0
    if F.HAS_BIAS:
        b_bias = load_float(bias + I_K * s_bias + o_d, m_d)
    p_state = states + ((I_K * NB + i_b) * n_states + i_first) * F.N * F.D
    if CHUNKED:  # the first block's state comes from step 2
        h = load_rows(p_state, F.N, 1, o_d, m_d, F)
    else:
        h = zero_rows(F.N, F.BD)
    for i_r in range(n_blocks):
        if SAVE:
            store_rows(p_state + i_r * (RIGHT * F.N * F.D), h, o_d, m_d, F)
        n_steps = tl.minimum(CB, L - (i_first + RIGHT * i_r) * CB).to(tl.int64)
        n_unrolled = n_steps // U * U
        for i in range(0, n_unrolled, U):
            h = scan_steps(
                h, b_A, b_D, b_bias, p_u, p_dt, p_z, p_B, p_C, p_y, p_acc, scale, i, o_d, m_d, U, I_K, RIGHT, S, F
            )  # fmt: skip
        if U > 1:
            for i in range(n_unrolled, n_steps):
                h = scan_steps(
                    h, b_A, b_D, b_bias, p_u, p_dt, p_z, p_B, p_C, p_y, p_acc, scale, i, o_d, m_d, 1, I_K, RIGHT, S, F
                )  # fmt: skip
        o = n_steps * RIGHT
        p_u += o * S.u
        p_dt += o * S.dt
        p_z += o * (S.z if F.HAS_Z else S.u)
        p_B += o * S.B
        p_C += o * S.C
        p_y += o * F.D
        p_acc += o * F.D
    if i_c == (n_chunks - 1 if RIGHT == 1 else 0):
        store_rows(last + (I_K * NB + i_b) * F.N * F.D, h, o_d, m_d, F)


@triton.jit(do_not_specialize=['NB', 'L', 'CB', 'R', 'n_chunks', 'n_states'])
def scan_forward_kernel(
    u, dt, A, B, C, D, z, bias, y, acc, states, last, scale, NB, L, CB, R, n_chunks, n_states,
    s_u, s_dt, s_A, s_B, s_C, s_D, s_z, s_bias, CHUNKED: tl.constexpr, SAVE: tl.constexpr, S: tl.constexpr,
    F: tl.constexpr, U: tl.constexpr,
):  # fmt: skip
    """Step 3. acc holds the first direction's float32 result until the second one comes by; it may be y itself."""
    pid = tl.program_id(0)
    i_t = pid % F.T
    i_c = pid // F.T % n_chunks
    i_b = (pid // F.T // n_chunks).to(tl.int64)
    scan_direction(
        u, dt, A, B, C, D, z, bias, y, acc, states, last, scale, i_b, i_t, i_c, NB, L, CB, R, n_chunks, n_states,
        s_u, s_dt, s_A, s_B, s_C, s_D, s_z, s_bias, 0, -1 if F.REVERSE else 1, CHUNKED, SAVE, S, F, U,
    )  # fmt: skip
    if F.K == 2:
        tl.debug_barrier()  # acc is read by the lanes that wrote it in every layout seen; this makes it sure
        scan_direction(
            u, dt, A, B, C, D, z, bias, y, acc, states, last, scale, i_b, i_t, i_c, NB, L, CB, R, n_chunks, n_states,
            s_u, s_dt, s_A, s_B, s_C, s_D, s_z, s_bias, 1, -1, CHUNKED, SAVE, S, F, U,
        )  # fmt: skip
