"""Numba code of the selective scan on a CPU: explicit vectors over channels, the state in registers, tokens in chunks.

Source: Mamba, arXiv 2312.00752, equation 2 and algorithm 2; the backward recomputes the states of a chunk from the
state at its start.

A tile of LANES neighbouring channels is one task's unit of work. Per chunk the step sizes and inputs go to scratch rows
that stay in the L1 cache; then, one state n after the other, a loop over the chunk's steps holds h_n in registers. The
vectors are LLVM vectors that this file emits itself: their width does not depend on the auto-vectoriser, and the
rounding trick in ``exp2`` is not undone by fast-math flags. Everything is one file because Numba's on-disk cache
does not notice edits in another one.
"""

# K directions (1 or 2), B batch, L tokens, D channels, N state size, G groups of DG = D / G channels, CH steps a chunk

from __future__ import annotations

import math

import numpy as np
from llvmlite import ir
from numba import carray, cfunc, from_dtype, njit, types
from numba.core.cgutils import get_or_insert_function
from numba.core.registry import cpu_target
from numba.extending import intrinsic, models, register_model


def _native_lanes() -> int:
    """float32 lanes of the widest vector register that Numba compiles for."""
    features = cpu_target.target_context.codegen().magic_tuple()[2].split(',')
    return 16 if '+avx512f' in features else 8 if '+avx' in features else 4


HALF = _native_lanes()
LANES = 2 * HALF
CH = 64
SLAB = 4  # tiles whose shares of dB and dC are added in scratch before they leave it

F32, I32, I64 = ir.FloatType(), ir.IntType(32), ir.IntType(64)
FB, HB, VB = 4, HALF * 4, LANES * 4  # bytes of one float, of half a vector, of a vector
LOG2E, LN2 = math.log2(math.e), math.log(2.0)
# Minimax fits made for this file: 2^x - 1 on [-1/2, 1/2], error relative to 2^x 2.0e-9 (one degree less: 9.1e-8, too
# much for the promise on accuracy); (atanh(s)/s - 1)/s^2 in s^2 on [0, 1/9], error relative to atanh(s)/s 4.5e-9.
EXP2 = (
    0.6931472028550939,
    0.24022647913626462,
    0.05550332471042374,
    0.009618437357646864,
    0.0013398874452311832,
    0.00015353361995032802,
)
ATANH = (0.33333208142721366, 0.2001076362761836, 0.1400090248276717, 0.14005994257023055)
ROUND = 12582912.0  # 1.5 * 2^23: adding it rounds to an integer, which then stands in the low bits
T_MIN, T_MAX = -126.0, 128.0  # 2^T_MIN is the smallest normal number, 2^T_MAX is inf

INT = types.int64
WORDS = (
    'next_task next_worker scratch scratch_bytes n_tasks K B L D N G chunks reverse softplus save const_b const_c '
    'u u_k u_b u_l dt dt_k dt_b dt_l z z_b z_l A Bq B_k B_b B_l B_g Cq C_k C_b C_l C_g skip bias out states last '
    'dout dlast du ddt dA dB dC dB_const dC_const dskip dbias dz slab_bytes slab'
).split()
# Counters, addresses, strides in bytes, sizes. The two counters come first: `counters` below is the block's address.
PARAMS = np.dtype([(word, np.int64) for word in WORDS] + [('scale', np.float64)])
PARAMS_T = from_dtype(PARAMS)


# ---- vectors ----


class VectorType(types.Type):
    def __init__(self, lanes: int):
        self.lanes = lanes
        super().__init__(name=f'f32x{lanes}')


@register_model(VectorType)
class VectorModel(models.PrimitiveModel):
    def __init__(self, dmm, fe_type):
        super().__init__(dmm, fe_type, ir.VectorType(F32, fe_type.lanes))


VEC, HVEC = VectorType(LANES), VectorType(HALF)


def _ir(vector: VectorType, element=F32):
    return ir.VectorType(element, vector.lanes)


def _const(value: float, vector: VectorType = VEC):
    return ir.Constant(_ir(vector), [value] * vector.lanes)


def _emit_fma(builder, x, y, z):
    fn_type = ir.FunctionType(x.type, [x.type] * 3)
    fn = get_or_insert_function(builder.module, fn_type, f'llvm.fmuladd.v{x.type.count}f32')
    return builder.call(fn, [x, y, z])


def _emit_exp2(builder, t):
    """2^t for |t| <= 126: 2^k in the exponent bits times a polynomial in t - k."""
    ints = _ir(VEC, I32)
    m = builder.fadd(t, _const(ROUND))
    r = builder.fsub(t, builder.fsub(m, _const(ROUND)))
    p = _const(EXP2[-1])
    for c in (*EXP2[-2::-1], 1.0):
        p = _emit_fma(builder, p, r, _const(c))
    k = builder.shl(builder.bitcast(m, ints), ir.Constant(ints, [23] * LANES))
    return builder.bitcast(builder.add(builder.bitcast(p, ints), k), _ir(VEC))


def _emit_clamp(builder, t):
    for test, limit in (('<', T_MIN), ('>', T_MAX)):  # in this form NaN passes
        t = builder.select(builder.fcmp_ordered(test, t, _const(limit)), _const(limit), t)
    return t


def _emit_splat(builder, x):
    undef = ir.Constant(_ir(VEC), ir.Undefined)
    first = builder.insert_element(undef, x, ir.Constant(I32, 0))
    return builder.shuffle_vector(first, undef, ir.Constant(_ir(VEC, I32), [0] * LANES))


def _pointer(builder, address, pointee):
    return builder.inttoptr(address, pointee.as_pointer())


def _loader(vector: VectorType):
    @intrinsic
    def load(typingctx, address):
        def emit(context, builder, sig, args):
            return builder.load(_pointer(builder, args[0], _ir(vector)), align=4)

        return vector(INT), emit

    return load


def _storer(vector: VectorType):
    @intrinsic
    def store(typingctx, address, value):
        def emit(context, builder, sig, args):
            builder.store(args[1], _pointer(builder, args[0], _ir(vector)), align=4)
            return context.get_dummy_value()

        return types.void(INT, vector), emit

    return store


def _unary(emit_ir):
    @intrinsic
    def op(typingctx, x):
        return VEC(VEC), lambda context, builder, sig, args: emit_ir(builder, *args)

    return op


def _binary(emit_ir, vector: VectorType = VEC):
    @intrinsic
    def op(typingctx, x, y):
        return vector(vector, vector), lambda context, builder, sig, args: emit_ir(builder, *args)

    return op


load, store = _loader(VEC), _storer(VEC)
load_half, store_half = _loader(HVEC), _storer(HVEC)
add, sub = _binary(lambda b, x, y: b.fadd(x, y)), _binary(lambda b, x, y: b.fsub(x, y))
mul, div = _binary(lambda b, x, y: b.fmul(x, y)), _binary(lambda b, x, y: b.fdiv(x, y))
add_half = _binary(lambda b, x, y: b.fadd(x, y), HVEC)
maximum = _binary(lambda b, x, y: b.select(b.fcmp_ordered('<', x, y), y, x))
neg = _unary(lambda b, x: b.fneg(x))
exp2_tame = _unary(_emit_exp2)
exp2 = _unary(lambda b, x: _emit_exp2(b, _emit_clamp(b, x)))


@intrinsic
def fma(typingctx, x, y, z):
    return VEC(VEC, VEC, VEC), lambda context, builder, sig, args: _emit_fma(builder, *args)


@intrinsic
def splat(typingctx, x):
    def emit(context, builder, sig, args):
        return _emit_splat(builder, builder.fptrunc(args[0], F32))

    return VEC(types.float64), emit


@intrinsic
def broadcast(typingctx, address):
    """The float at an address in every lane."""

    def emit(context, builder, sig, args):
        return _emit_splat(builder, builder.load(_pointer(builder, args[0], F32), align=4))

    return VEC(INT), emit


@intrinsic
def fold(typingctx, x):
    """Lower half plus upper half."""

    def emit(context, builder, sig, args):
        half = _ir(HVEC, I32)
        low, high = ir.Constant(half, list(range(HALF))), ir.Constant(half, list(range(HALF, LANES)))
        return builder.fadd(*(builder.shuffle_vector(args[0], args[0], index) for index in (low, high)))

    return HVEC(VEC), emit


@intrinsic
def half_sum(typingctx, x):
    """Sum of the lanes, in a fixed order."""

    def emit(context, builder, sig, args):
        value, lanes = args[0], HALF
        while lanes > 1:
            lanes //= 2
            index = ir.VectorType(I32, lanes)
            low, high = ir.Constant(index, list(range(lanes))), ir.Constant(index, list(range(lanes, 2 * lanes)))
            value = builder.fadd(*(builder.shuffle_vector(value, value, part) for part in (low, high)))
        return builder.extract_element(value, ir.Constant(I32, 0))

    return types.float32(HVEC), emit


@intrinsic
def all_at_most(typingctx, x, y):
    """Whether x <= y in every lane; a NaN is not."""

    def emit(context, builder, sig, args):
        mask = builder.bitcast(builder.fcmp_ordered('<=', *args), ir.IntType(LANES))
        return builder.icmp_unsigned('==', mask, ir.Constant(ir.IntType(LANES), 2**LANES - 1))

    return types.boolean(VEC, VEC), emit


@intrinsic
def get(typingctx, address):
    def emit(context, builder, sig, args):
        return builder.load(_pointer(builder, args[0], F32), align=4)

    return types.float32(INT), emit


@intrinsic
def put(typingctx, address, value):
    def emit(context, builder, sig, args):
        builder.store(args[1], _pointer(builder, args[0], F32), align=4)
        return context.get_dummy_value()

    return types.void(INT, types.float32), emit


@intrinsic
def address_of(typingctx, pointer):
    return INT(pointer), lambda context, builder, sig, args: builder.ptrtoint(args[0], I64)


@intrinsic
def take_ticket(typingctx, address):
    """Atomically counts up and returns the count before: how the workers share out the tasks."""

    def emit(context, builder, sig, args):
        return builder.atomic_rmw('add', _pointer(builder, args[0], I64), ir.Constant(I64, 1), 'seq_cst')

    return INT(INT), emit


_function = njit(error_model='numpy', boundscheck=False)
_inline = njit(error_model='numpy', boundscheck=False, forceinline=True)


@_inline
def sigmoid(x):
    return div(splat(1.0), add(splat(1.0), exp2(mul(x, splat(-LOG2E)))))


@_inline
def softplus(x):
    """max(x, 0) + log(1 + e), e = exp(-|x|), as 2 atanh(e / (2 + e)): exact to rounding for small results too."""
    e = exp2(mul(maximum(x, neg(x)), splat(-LOG2E)))
    s = div(e, add(e, splat(2.0)))
    w = mul(s, s)
    p = fma(fma(fma(splat(ATANH[3]), w, splat(ATANH[2])), w, splat(ATANH[1])), w, splat(ATANH[0]))
    return fma(mul(add(s, s), w), p, add(maximum(x, splat(0.0)), add(s, s)))


@_function
def copy_floats(target, source, m):
    for i in range(m):
        put(target + FB * i, get(source + FB * i))


@_inline
def load_row(address, m, spare):
    """LANES floats, of which the first m exist and the others are 0."""
    if m == LANES:
        return load(address)
    store(spare, splat(0.0))
    copy_floats(spare, address, m)
    return load(spare)


@_inline
def store_row(address, x, m, spare):
    if m == LANES:
        store(address, x)
    else:
        store(spare, x)
        copy_floats(address, spare, m)


@_function
def load_tile(tile, source, m, N, factor):
    """Transposes m rows of N floats into N rows of LANES; lanes beyond m are 0."""
    for n in range(N):
        store(tile + VB * n, splat(0.0))
        for i in range(m):
            put(tile + VB * n + FB * i, np.float32(get(source + FB * (i * N + n)) * factor))


@_function
def store_tile(target, tile, m, N, factor):
    for n in range(N):
        for i in range(m):
            put(target + FB * (i * N + n), np.float32(get(tile + VB * n + FB * i) * factor))


@_function
def fill_tile(tile, rows, value):
    for n in range(rows):
        store(tile + VB * n, splat(value))


@_inline
def step_size(a, p_dt, v_bias, m, spare):
    x = add(load_row(p_dt, m, spare), v_bias)
    return softplus(x) if a.softplus else x


@_inline
def direction(a, k):
    """(token of the first step, +1 or -1)."""
    if (k == 1) if a.K == 2 else (a.reverse != 0):
        return a.L - 1, -1
    return 0, 1


@_function
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
    return CH * ROW + VB * (1 + N // LANES + 1) + slab * VB * (4 * N + 3)


@_function
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


@_function
def scan_rows(rows, T, N, p_A, p_h, p_B, s_B, p_C, s_C):
    """The hot loop: h = 2^(delta A) h + delta u B,  y += C h."""
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


@_function
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


@_function
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
                v_y = mul(v_y, mul(v_z, sigmoid(v_z)))
            v_y = mul(v_y, v_scale)
        store_row(p_out, v_y, m, spare)
        rows += ROW
        p_u += s_u
        p_out += s_out
        p_z += s_z


@_function
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


def forward(params):
    """A worker: takes slabs until none is left."""
    a, counters = carray(params, 1)[0], address_of(params)
    scratch = a.scratch + take_ticket(counters + 8) * a.scratch_bytes
    slabs = (a.D // a.G + a.slab * LANES - 1) // (a.slab * LANES)
    while True:
        task = take_ticket(counters)
        if task >= a.n_tasks:
            break
        forward_slab(a, task // (a.G * slabs), task // slabs % a.G, task % slabs, scratch)


# ---- backward ----

B_ROW = 7 * VB  # delta, delta * u, gated dout, y, sum of g B, sum of q A, d delta / d dt
B_DL, B_DU, B_DY, B_Y, B_GB, B_QA, B_SIG = (VB * i for i in range(7))


def backward_scratch_bytes(N: int) -> int:
    rows = CH * B_ROW + 2 * (CH + 1) * VB + 2 * CH * N * HB
    tiles = SLAB * (7 * N + 5) * VB
    return rows + tiles + VB * (N // LANES + 4)


@_function
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
            v_dy = mul(v_dy, mul(v_z, sigmoid(v_z)))
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


@_function
def sweep_rows(rows, T, N, p_A, p_h0, s_h0, m, p_g, p_dA, p_hs, p_es, p_dB, p_dC, p_B, s_B, p_C, s_C, spare):
    """One chunk, one state after the other: states forward into scratch, then gradients backward."""
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
            store_half(dC, add_half(load_half(dC), fold(mul(v_dy, load(hs)))))
            hs -= VB
            store_half(dB, add_half(load_half(dB), fold(mul(v_g, load(row + B_DU)))))
            store(row + B_GB, fma(v_g, broadcast(p_b), load(row + B_GB)))
            v_g = mul(v_g, load(es))
            v_q = mul(v_g, load(hs))
            v_dA = fma(v_q, load(row + B_DL), v_dA)
            store(row + B_QA, fma(v_q, v_A, load(row + B_QA)))
        store(p_g + VB * n, v_g)
        store(p_dA + VB * n, add(load(p_dA + VB * n), v_dA))


@_function
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
            store_half(dC, add_half(load_half(dC), fold(mul(v_dc, v_wc))))
            hs -= VB
            v_db = mul(v_g, load(row + B_DU))
            v_dwb = fma(v_db, v_b, v_dwb)
            store_half(dB, add_half(load_half(dB), fold(mul(v_db, v_wb))))
            store(row + B_GB, fma(v_g, mul(v_b, v_wb), load(row + B_GB)))
            v_g = mul(v_g, load(es))
            v_q = mul(v_g, load(hs))
            v_dA = fma(v_q, load(row + B_DL), v_dA)
            store(row + B_QA, fma(v_q, v_A, load(row + B_QA)))
        store(p_g + VB * n, v_g)
        store(p_dA + VB * n, add(load(p_dA + VB * n), v_dA))
        store(p_dwb + VB * n, add(load(p_dwb + VB * n), v_dwb))
        store(p_dwc + VB * n, add(load(p_dwc + VB * n), v_dwc))


@_function
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
            v_s = sigmoid(v_z)
            v_slope = mul(v_s, fma(v_z, sub(splat(1.0), v_s), splat(1.0)))
            v_y = fma(v_skip, v_u, load(rows + B_Y))
            v_dz = mul(mul(mul(load_row(p_g, m, spare), v_scale), v_y), v_slope)
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


@_function
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


def backward(params):
    """A worker: takes slabs until none is left."""
    a, counters = carray(params, 1)[0], address_of(params)
    scratch = a.scratch + take_ticket(counters + 8) * a.scratch_bytes
    slabs = (a.D // a.G + SLAB * LANES - 1) // (SLAB * LANES)
    while True:
        task = take_ticket(counters)
        if task >= a.n_tasks:
            break
        backward_slab(a, task // (a.G * slabs), task // slabs % a.G, task % slabs, scratch)


def compile_worker(worker):
    """Compiles ``forward`` or ``backward`` to a C function, from the on-disk cache where one can be written."""
    signature = types.void(types.CPointer(PARAMS_T))
    options = dict(error_model='numpy', boundscheck=False)
    try:
        return cfunc(signature, cache=True, **options)(worker)
    except (RuntimeError, OSError):  # Numba found no folder that it may write to
        return cfunc(signature, **options)(worker)
