"""Triton kernel of the selective scan, backward. Gradients need no atomics, so two runs give the same bits.

With g_l the gradient of the state h_l, a_l = exp(delta_l A) and o_l that of y_l before gate and scale,

    g_l = o_l C_l + a_{l+1} g_{l+1}        dC_l = o_l h_l          dB_l = g_l delta_l u_l
    d delta_l = sum_n g_l (B_l u_l + A a_l h_{l-1})                dA = sum_l g_l a_l h_{l-1} delta_l

The forward pass keeps the state at the start of every block of CB tokens. Per block, from the last to the first, this
kernel walks along the scan once and notes the state every STEPS tokens in scratch memory, then goes back: the STEPS - 1
states between two notes are computed anew, held in registers and used. A state is never recovered by dividing by a
decay.

What a chunk passes to the chunk before it (in the order of the scan), g decayed over the chunk, comes from the kernels
of the forward pass with ADJOINT. Sums over channels, for B and C, and over batch and chunks, for parameters, are
partial sums per program, added up in a fixed order by the caller. States are tiles [BD, BN] here, N padded to BN: the
compiler spreads both dimensions over the lanes, which halves the shuffles of the sums against one channel to a lane.
"""

# K directions (1 or 2), B batch, L tokens, D channels, N state size, G groups of DG channels, T tiles of BD channels

from __future__ import annotations

import triton
import triton.language as tl

from ...triton_utils import LN2, LOG2E, exp2, sigmoid
from .gpu_forward import load_float, step_size, tile_of_channels, walks_left


@triton.jit
def token_tile(p, o_d, o_n, m, m_dn, PACK: tl.constexpr, F: tl.constexpr):
    """B or C of one token as (1, BN), or (BD, BN) if it is constant over the tokens."""
    if PACK == 0:
        return tl.load(p + o_d[:, None] * F.N + o_n[None, :], mask=m_dn, other=0.0)
    else:
        m_n = (o_n < F.N) & m
        return tl.load(p + o_n, mask=m_n, other=0.0).to(tl.float32)[None, :]


@triton.jit
def masked_step(p_dt, b_bias, m, F: tl.constexpr):
    """delta of a tile at one token, 0 past the end: such a step leaves the state alone."""
    # softplus(0 + bias), which a masked load alone would give, does not
    return tl.where(m, step_size(p_dt, b_bias, m, F), 0.0)


@triton.jit
def walk_and_note(
    b_h, p_scratch, b_A, b_bias, p_u, p_dt, p_B, right, n_steps, n_sub, o_d, o_n, o_s, m_d, m_dn, S: tl.constexpr,
    F: tl.constexpr, BN: tl.constexpr, STEPS: tl.constexpr,
):  # fmt: skip
    """Walks along a block from the state at its start, notes every STEPS-th state and returns the last one."""
    BD: tl.constexpr = F.BD
    for i_s in range(n_sub):
        tl.store(p_scratch + i_s * BD * BN + o_s, b_h)
        for j in tl.static_range(STEPS):
            i = i_s * STEPS + j
            o = right * i
            m = m_d & (tl.full([BD], i, tl.int32) < n_steps)
            b_dl = masked_step(p_dt + o * S.dt + o_d, b_bias, m, F)
            b_x = b_dl * load_float(p_u + o * S.u + o_d, m)
            b_B = token_tile(p_B + o * S.B, o_d, o_n, tl.full([BN], i, tl.int32) < n_steps, m_dn, F.PACK_B, F)
            b_h = exp2(b_dl[:, None] * b_A, F.FAST) * b_h + b_x[:, None] * b_B
    return b_h


@triton.jit
def states_between_notes(
    b_h, b_A, b_bias, p_u, p_dt, p_B, right, n_steps, i_0, o_d, o_n, m_d, m_dn, S: tl.constexpr, F: tl.constexpr,
    BN: tl.constexpr, STEPS: tl.constexpr,
):  # fmt: skip
    """The noted state before token i_0 and those after it and the next STEPS - 2, with their delta and u."""
    BD: tl.constexpr = F.BD
    hs = (b_h,)
    dls = ()
    us = ()
    for j in tl.static_range(STEPS - 1):
        o = right * (i_0 + j)
        m = m_d & (tl.full([BD], i_0 + j, tl.int32) < n_steps)
        b_dl = masked_step(p_dt + o * S.dt + o_d, b_bias, m, F)
        b_u = load_float(p_u + o * S.u + o_d, m)
        m_n = tl.full([BN], i_0 + j, tl.int32) < n_steps
        b_B = token_tile(p_B + o * S.B, o_d, o_n, m_n, m_dn, F.PACK_B, F)
        b_h = exp2(b_dl[:, None] * b_A, F.FAST) * b_h + (b_dl * b_u)[:, None] * b_B
        hs = hs + (b_h,)
        dls = dls + (b_dl,)
        us = us + (b_u,)
    return hs, dls, us


@triton.jit
def sweep_step(
    b_g, b_dA, b_dB, b_dC, b_dD, b_dbias, b_before, b_h, b_dl, b_u, b_A, b_D, b_bias, p_dt, p_z, p_B, p_C, p_dy,
    p_du, p_ddt, p_dz, p_dB, p_dC, scale, o, o_d, o_n, m, m_n, m_dn, S: tl.constexpr, F: tl.constexpr,
):  # fmt: skip
    """Gradients at one token: takes a_{l+1} g_{l+1} and returns a_l g_l, with the sums that run along the tokens."""
    b_B = token_tile(p_B + o * S.B, o_d, o_n, m_n, m_dn, F.PACK_B, F)
    b_C = token_tile(p_C + o * S.C, o_d, o_n, m_n, m_dn, F.PACK_C, F)
    b_o = load_float(p_dy + o * S.dy + o_d, m) * scale
    if F.HAS_Z:
        b_z = load_float(p_z + o * S.z + o_d, m)
        b_sig = sigmoid(b_z, F.FAST)
        # y is computed anew: keeping it would cost as much memory as the result of the scan
        b_y = tl.sum(b_C * b_h, axis=1)
        if F.HAS_D:
            b_y += b_D * b_u
        b_dz = b_o * b_y * b_sig * (1.0 + b_z * (1.0 - b_sig))
        tl.store(p_dz + o * F.D + o_d, b_dz.to(p_dz.dtype.element_ty), mask=m)
        b_o *= b_z * b_sig
    b_oh = b_o[:, None] * b_h
    b_g += b_o[:, None] * b_C
    b_gx = b_g * (b_dl * b_u)[:, None]
    if F.PACK_C == 0:
        b_dC += b_oh
    else:
        tl.store(p_dC + o * (F.T * F.N) + o_n, tl.sum(b_oh, axis=0), mask=m_n & (o_n < F.N))
    if F.PACK_B == 0:
        b_dB += b_gx
    else:
        tl.store(p_dB + o * (F.T * F.N) + o_n, tl.sum(b_gx, axis=0), mask=m_n & (o_n < F.N))
    b_gB = tl.sum(b_g * b_B, axis=1)
    # the decay is computed once more: kept from the walk, it would not fit into registers beside the states
    b_g *= exp2(b_dl[:, None] * b_A, F.FAST)
    b_q = b_g * b_before
    b_dA += b_q * b_dl[:, None]
    b_ddl = b_gB * b_u + tl.sum(b_q * b_A, axis=1) * LN2  # takes back the log2(e) in b_A
    b_du = b_gB * b_dl
    if F.HAS_D:
        b_du += b_o * b_D
        b_dD += b_o * b_u
    if F.SOFTPLUS:
        b_dt = load_float(p_dt + o * S.dt + o_d, m)
        if F.HAS_BIAS:
            b_dt += b_bias
        b_ddl *= sigmoid(b_dt, F.FAST)
    # past the end delta is 0, but not its gradient: g passes through such a step
    b_ddl = tl.where(m, b_ddl, 0.0)
    b_dbias += b_ddl
    tl.store(p_du + o * F.D + o_d, b_du.to(p_du.dtype.element_ty), mask=m)
    tl.store(p_ddt + o * F.D + o_d, b_ddl.to(p_ddt.dtype.element_ty), mask=m)
    return b_g, b_dA, b_dB, b_dC, b_dD, b_dbias


@triton.jit
def store_shares(
    dA, dB, dC, dD, dbias, b_dA, b_dB, b_dC, b_dD, b_dbias, i_part, o_d, o_dn, m_d, m_dn, F: tl.constexpr
):  # fmt: skip
    """Writes a chunk's share of what is summed over tokens: gradients of A, D, dt_bias, and of constant B and C."""
    tl.store(dA + i_part * F.D * F.N + o_dn, b_dA, mask=m_dn)
    if F.PACK_B == 0:
        tl.store(dB + i_part * F.D * F.N + o_dn, b_dB, mask=m_dn)
    if F.PACK_C == 0:
        tl.store(dC + i_part * F.D * F.N + o_dn, b_dC, mask=m_dn)
    if F.HAS_D:
        tl.store(dD + i_part * F.D + o_d, b_dD, mask=m_d)
    if F.HAS_BIAS:
        tl.store(dbias + i_part * F.D + o_d, b_dbias, mask=m_d)


@triton.jit(do_not_specialize=['NB', 'L', 'CB', 'R', 'n_chunks', 'n_states', 'n_items', 'n_programs'])
def scan_backward_kernel(
    u, dt, A, B, C, D, z, bias, dy, states, adjoint, scratch, du, ddt, dz, dB, dC, dA, dD, dbias, scale,
    NB, L, CB, R, n_chunks, n_states, n_items, n_programs, s_u, s_dt, s_A, s_B, s_C, s_D, s_z, s_bias, s_dy,
    HAS_ADJOINT: tl.constexpr, S: tl.constexpr, F: tl.constexpr, BN: tl.constexpr, STEPS: tl.constexpr,
):  # fmt: skip
    """An item is a chunk of a tile of channels. Each program needs scratch memory, so few programs take many items."""
    BD: tl.constexpr = F.BD  # Triton 3.6 takes no plain number beside a constexpr in a shape
    pid = tl.program_id(0)
    o_n = tl.arange(0, BN)
    o_s = tl.arange(0, BD)[:, None] * BN + o_n[None, :]
    # notes belong to a program, not to an item, so that they stay in the cache; int64, as their offset can pass 2^31
    p_scratch = scratch + pid.to(tl.int64) * (CB // STEPS) * BD * BN
    # hoisting out of these two loops costs registers for what little the rare turns save
    for item in tl.range(pid, n_items, n_programs, disable_licm=True):
        i_t = item % F.T
        i_c = item // F.T % n_chunks
        i_kb = (item // F.T // n_chunks).to(tl.int64)
        i_k = i_kb // NB
        i_b = i_kb % NB
        i_g, o_d, m_d = tile_of_channels(i_t, F)
        m_dn = m_d[:, None] & (o_n < F.N)[None, :]
        o_dn = o_d[:, None] * F.N + o_n[None, :]
        left = walks_left(i_k, False, F).to(tl.int32)
        right = 1 - 2 * left
        n_blocks = tl.minimum(R, n_states - i_c * R)
        b_A = tl.load(A + i_k * s_A[0] + o_d[:, None] * s_A[1] + o_n[None, :] * s_A[2], mask=m_dn, other=0.0)
        b_A = b_A.to(tl.float32) * LOG2E  # exp(x A) = 2^(x b_A): GPUs have an instruction for 2^x, none for exp
        b_D = 0.0
        if F.HAS_D:
            b_D = load_float(D + i_k * s_D + o_d, m_d)
        b_bias = 0.0
        if F.HAS_BIAS:
            b_bias = load_float(bias + i_k * s_bias + o_d, m_d)
        b_g = tl.zeros([BD, BN], tl.float32)  # what the token after the chunk passes back, decayed
        if HAS_ADJOINT:
            b_g = tl.load(adjoint + (i_kb * n_chunks + i_c) * F.D * F.N + o_dn, mask=m_dn, other=0.0)
        # sums over the tokens of the chunk stay in registers and leave once, at its end
        b_dA = tl.zeros([BD, BN], tl.float32)
        b_dB = tl.zeros([BD, BN], tl.float32)
        b_dC = tl.zeros([BD, BN], tl.float32)
        b_dD = tl.zeros([BD], tl.float32)
        b_dbias = tl.zeros([BD], tl.float32)
        for i_r in tl.range(n_blocks, disable_licm=True):
            # from the scan's last block to its first, which for the scan to the left is from left to right
            block = i_c * R + (left * i_r + (1 - left) * (n_blocks - 1 - i_r))
            n_steps = tl.minimum(CB, L - block * CB)
            n_sub = tl.cdiv(n_steps, STEPS)
            row = block.to(tl.int64) * CB + left * (n_steps - 1)
            p_u = u + i_k * s_u[0] + i_b * s_u[1] + row * S.u
            p_dt = dt + i_k * s_dt[0] + i_b * s_dt[1] + row * S.dt
            p_B = B + i_k * s_B[0] + i_b * s_B[1] + i_g * s_B[2] + row * S.B
            p_C = C + i_k * s_C[0] + i_b * s_C[1] + i_g * s_C[2] + row * S.C
            p_dy = dy + i_b * s_dy + row * S.dy
            p_z = p_dy
            if F.HAS_Z:
                p_z = z + i_b * s_z + row * S.z
            o_out = (i_kb * L + row) * F.D
            p_du = du + o_out
            p_ddt = ddt + o_out
            p_dz = dz
            if F.HAS_Z:
                p_dz = dz + o_out
            o_row = ((i_kb * L + row) * F.T + i_t) * F.N
            p_dB = dB + (o_row if F.PACK_B else 0)
            p_dC = dC + (o_row if F.PACK_C else 0)
            b_h = tl.load(states + (i_kb * n_states + block) * F.D * F.N + o_dn, mask=m_dn, other=0.0)
            b_end = walk_and_note(
                b_h, p_scratch, b_A, b_bias, p_u, p_dt, p_B, right, n_steps, n_sub, o_d, o_n, o_s, m_d, m_dn, S, F, BN,
                STEPS,
            )  # fmt: skip
            tl.debug_barrier()  # notes may be read by other lanes than wrote them
            for i_s in range(n_sub):
                i_0 = (n_sub - 1 - i_s) * STEPS
                b_h = tl.load(p_scratch + (n_sub - 1 - i_s) * BD * BN + o_s)
                hs, dls, us = states_between_notes(
                    b_h, b_A, b_bias, p_u, p_dt, p_B, right, n_steps, i_0, o_d, o_n, m_d, m_dn, S, F, BN, STEPS
                )
                hs = hs + (b_end,)  # the next note, or the end of the block
                b_end = hs[0]
                for j in tl.static_range(STEPS):
                    i = i_0 + STEPS - 1 - j
                    o = right * i
                    m = m_d & (tl.full([BD], i, tl.int32) < n_steps)
                    m_n = tl.full([BN], i, tl.int32) < n_steps
                    b_h = hs[STEPS - j]
                    if j == 0:  # its state was known, so nothing of this token is loaded yet
                        b_dl = masked_step(p_dt + o * S.dt + o_d, b_bias, m, F)
                        b_u = load_float(p_u + o * S.u + o_d, m)
                    else:
                        b_dl = dls[STEPS - 1 - j]
                        b_u = us[STEPS - 1 - j]
                    b_g, b_dA, b_dB, b_dC, b_dD, b_dbias = sweep_step(
                        b_g, b_dA, b_dB, b_dC, b_dD, b_dbias, hs[STEPS - 1 - j], b_h, b_dl, b_u, b_A, b_D, b_bias,
                        p_dt, p_z, p_B, p_C, p_dy, p_du, p_ddt, p_dz, p_dB, p_dC, scale, o, o_d, o_n, m, m_n, m_dn,
                        S, F,
                    )  # fmt: skip
            tl.debug_barrier()  # the next block writes over the notes
        i_part = i_kb * n_chunks + i_c
        store_shares(dA, dB, dC, dD, dbias, b_dA, b_dB, b_dC, b_dD, b_dbias, i_part, o_d, o_dn, m_d, m_dn, F)
