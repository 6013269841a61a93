"""Explicit vectors for the Numba kernels: LLVM vector types and instructions, elementary functions, compiled workers.

The vectors are LLVM vectors that this file emits itself: their width does not depend on the auto-vectoriser, and the
rounding trick in ``exp2`` is not undone by fast-math flags.
"""

from __future__ import annotations

import hashlib
import math
import sys
from collections.abc import Callable
from functools import cache
from pathlib import Path

import numpy as np
from llvmlite import ir
from numba import cfunc, from_dtype, njit, types
from numba.core.cgutils import get_or_insert_function
from numba.core.registry import cpu_target
from numba.extending import intrinsic, models, register_model

from .cpu_cache import compile_cached

_FEATURES = cpu_target.target_context.codegen().magic_tuple()[2].split(',')  # of the CPU that Numba compiles for
HALF = 16 if '+avx512f' in _FEATURES else 8 if '+avx' in _FEATURES else 4  # float32 lanes of its widest registers
PERMUTE = {16: 'llvm.x86.avx512.permvar.sf.512', 8: 'llvm.x86.avx2.permps'}.get(HALF)  # table[index] in every lane
if HALF == 8 and '+avx2' not in _FEATURES:
    PERMUTE = None
LANES = 2 * HALF

F32, I32, I64 = ir.FloatType(), ir.IntType(32), ir.IntType(64)
FB, HB, VB = 4, HALF * 4, LANES * 4  # bytes of one float, of half a vector, of a vector
LOG2E, LN2 = math.log2(math.e), math.log(2.0)
LOG2E_HIGH = float(np.float32(LOG2E))
LOG2E_REST = LOG2E - LOG2E_HIGH
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
# (2^x - 1) / x on [-1/16, 1/16] (8 lanes) and [-1/32, 1/32] (16 lanes), error relative to it 3.7e-9 and 2.3e-10: where
# states decay slowly, it is 1 - 2^x that counts (one degree less: 8.5e-7 and 1.1e-7).
EXP2_NARROW = {
    8: (0.6931471780166334, 0.24022650578418053, 0.055509317301749767, 0.009619031578604597),
    16: (0.693147180400995, 0.24022650688567054, 0.05550541078361643, 0.009618354719107264),
}
ATANH = (0.33333208142721366, 0.2001076362761836, 0.1400090248276717, 0.14005994257023055)
ROUND = 12582912.0  # 1.5 * 2^23: adding it rounds to an integer, which then stands in the low bits
T_MIN, T_MAX = -126.0, 128.0  # 2^T_MIN is the smallest normal number, 2^T_MAX the first that overflows


INT = types.int64
F32_MAX = float(np.finfo(np.float32).max)


def params_dtype(words: str) -> np.dtype:
    """The parameter block of a worker: 64-bit words, the two counters first, and one float, ``scale``."""
    names = ['next_task', 'next_worker', 'scratch', 'scratch_bytes', 'n_tasks', *words.split()]
    return np.dtype([(name, np.int64) for name in names] + [('scale', np.float64)])


# ---- vectors ----


class VectorType(types.Type):
    """Type of a vector of so many float32 lanes in Numba code."""

    def __init__(self, lanes: int):
        self.lanes = lanes
        super().__init__(name=f'f32x{lanes}')


@register_model(VectorType)
class VectorModel(models.PrimitiveModel):
    """How Numba keeps a vector: as an LLVM vector, in a register."""

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


def _emit_exp2(builder, t, less=0):
    """2^(t - less) for t - less from T_MIN to 127.9: 2^k in the exponent bits times a polynomial in t - less - k."""
    if PERMUTE:
        return _emit_exp2_table(builder, t, less)
    ints = _ir(VEC, I32)
    m = builder.fadd(t, _const(ROUND + 127 - less))  # 127: the exponent's bias
    r = builder.fsub(t, builder.fsub(m, _const(ROUND + 127 - less)))
    p = _const(EXP2[-1])
    for c in (*EXP2[-2::-1], 1.0):
        p = _emit_fma(builder, p, r, _const(c))
    scale = builder.shl(builder.bitcast(m, ints), ir.Constant(ints, [23] * LANES))
    return builder.fmul(p, builder.bitcast(scale, _ir(VEC)))  # integer addition of k would make numbers of some NaNs


def _emit_exp2_table(builder, t, less):
    """As _emit_exp2, as 2^k 2^(j / HALF) 2^r with 2^(j / HALF) from a register: fewer multiplications.

    Adding ROUND / HALF rounds t to k + j / HALF and leaves k HALF + j in the low bits. Shifted into the exponent, j
    would spill into the mantissa: the table's entries have it subtracted.
    """
    bits = HALF.bit_length() - 1
    ints = _ir(VEC, I32)
    m = builder.fadd(t, _const(ROUND / HALF - less))
    r = builder.fsub(t, builder.fsub(m, _const(ROUND / HALF - less)))
    index = builder.bitcast(m, ints)
    entries = np.exp2(np.arange(HALF) / HALF).astype(np.float32).view(np.int32) - (np.arange(HALF) << (23 - bits))
    lanes = _ir(HVEC, I32)
    table = builder.bitcast(ir.Constant(lanes, [int(entry) for entry in entries]), _ir(HVEC))
    halves = []
    for first in (0, HALF):
        part = builder.shuffle_vector(index, index, ir.Constant(lanes, list(range(first, first + HALF))))
        halves.append(_emit_permute(builder, table, part))
    both = ir.Constant(ints, list(range(LANES)))
    scale = builder.bitcast(builder.shuffle_vector(*halves, both), ints)
    shift = ir.Constant(ints, [23 - bits] * LANES)
    scale = builder.bitcast(builder.add(scale, builder.shl(index, shift)), _ir(VEC))
    p = _const(EXP2_NARROW[HALF][-1])
    for c in EXP2_NARROW[HALF][-2::-1]:
        p = _emit_fma(builder, p, r, _const(c))
    return _emit_fma(builder, scale, builder.fmul(p, r), scale)


def _emit_permute(builder, table, index):
    """table[index mod HALF] in every lane."""
    fn_type = ir.FunctionType(table.type, [table.type, index.type])
    return builder.call(get_or_insert_function(builder.module, fn_type, PERMUTE), [table, index])


def _emit_half_exp2(builder, t):
    """2^t / 2, which is still finite where 2^t is, and the half of inf where 2^t overflows: twice it is right there.

    The factor 2^128 would be inf, and inf times a remainder of 0 is NaN. Below 2^-125 it is 0: a smallest number in its
    place would count where it meets a large one.
    """
    tiny = builder.fcmp_ordered('<', t, _const(T_MIN + 1))  # in this form NaN passes
    t = builder.select(tiny, _const(T_MIN + 1), t)
    t = builder.select(builder.fcmp_ordered('>', t, _const(T_MAX)), _const(T_MAX), t)
    return builder.select(tiny, _const(0.0), _emit_exp2(builder, t, 1))


def _emit_splat(builder, x):
    undef = ir.Constant(_ir(VEC), ir.Undefined)
    first = builder.insert_element(undef, x, ir.Constant(I32, 0))
    return builder.shuffle_vector(first, undef, ir.Constant(_ir(VEC, I32), [0] * LANES))


def _pointer(builder, address, pointee):
    return builder.inttoptr(address, pointee.as_pointer())


def _loader(vector: VectorType):
    @intrinsic
    def load(typingctx, address):
        """The vector at an address, which need not be aligned."""

        def emit(context, builder, sig, args):
            return builder.load(_pointer(builder, args[0], _ir(vector)), align=4)

        return vector(INT), emit

    return load


def _storer(vector: VectorType):
    @intrinsic
    def store(typingctx, address, value):
        """Writes a vector to an address, which need not be aligned."""

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


def _binary(emit_ir):
    @intrinsic
    def op(typingctx, x, y):
        return x(x, x), lambda context, builder, sig, args: emit_ir(builder, *args)

    return op


load, store = _loader(VEC), _storer(VEC)
load_half, store_half = _loader(HVEC), _storer(HVEC)
add, sub = _binary(lambda b, x, y: b.fadd(x, y)), _binary(lambda b, x, y: b.fsub(x, y))
mul, div = _binary(lambda b, x, y: b.fmul(x, y)), _binary(lambda b, x, y: b.fdiv(x, y))
minimum = _binary(lambda b, x, y: b.select(b.fcmp_ordered('>', x, y), y, x))  # NaN in x stays
maximum = _binary(lambda b, x, y: b.select(b.fcmp_ordered('<', x, y), y, x))
neg = _unary(lambda b, x: b.fneg(x))
exp2_tame = _unary(_emit_exp2)
half_exp2 = _unary(_emit_half_exp2)


@intrinsic
def fma(typingctx, x, y, z):
    """x y + z, in one instruction where the CPU has it."""
    return x(x, x, x), lambda context, builder, sig, args: _emit_fma(builder, *args)


@intrinsic
def zero_above(typingctx, x, y, limit):
    """x where y is at most the limit or NaN, else 0."""

    def emit(context, builder, sig, args):
        return builder.select(builder.fcmp_ordered('>', args[1], args[2]), _const(0.0), args[0])

    return x(x, x, x), emit


@intrinsic
def splat(typingctx, x):
    """A number in every lane."""

    def emit(context, builder, sig, args):
        return _emit_splat(builder, builder.fptrunc(args[0], F32))

    return VEC(types.float64), emit


@intrinsic
def splat_half(typingctx, x):
    """A number in every lane of half a vector."""

    def emit(context, builder, sig, args):
        undef = ir.Constant(_ir(HVEC), ir.Undefined)
        first = builder.insert_element(undef, builder.fptrunc(args[0], F32), ir.Constant(I32, 0))
        return builder.shuffle_vector(first, undef, ir.Constant(_ir(HVEC, I32), [0] * HALF))

    return HVEC(types.float64), emit


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
    """The float at an address."""

    def emit(context, builder, sig, args):
        return builder.load(_pointer(builder, args[0], F32), align=4)

    return types.float32(INT), emit


@intrinsic
def put(typingctx, address, value):
    """Writes a float to an address."""

    def emit(context, builder, sig, args):
        builder.store(args[1], _pointer(builder, args[0], F32), align=4)
        return context.get_dummy_value()

    return types.void(INT, types.float32), emit


@intrinsic
def address_of(typingctx, pointer):
    """The address that a pointer holds, as an integer."""
    return INT(pointer), lambda context, builder, sig, args: builder.ptrtoint(args[0], I64)


@intrinsic
def take_ticket(typingctx, address):
    """Atomically counts up and returns the count before: how the workers share out the tasks."""

    def emit(context, builder, sig, args):
        return builder.atomic_rmw('add', _pointer(builder, args[0], I64), ir.Constant(I64, 1), 'seq_cst')

    return INT(INT), emit


function = njit(error_model='numpy', boundscheck=False)
inline = njit(error_model='numpy', boundscheck=False, forceinline=True)


@inline
def exp2(x):
    """2^x; 0 where it is below 2^-125, inf where it overflows."""
    v = half_exp2(x)
    return add(v, v)


@inline
def one_plus_exp_neg(x):
    """1 + exp(-x), inf where exp(-x) overflows."""
    return fma(half_exp2(mul(x, splat(-LOG2E))), splat(2.0), splat(1.0))


@inline
def sigmoid(x):
    """1 / (1 + exp(-x))."""
    return div(splat(1.0), one_plus_exp_neg(x))


@inline
def silu(x):
    """x / (1 + exp(-x))."""
    return div(x, one_plus_exp_neg(x))


@inline
def silu_slope(x):
    """The derivative of SiLU; NaN at both infinities, as PyTorch's."""
    s = sigmoid(x)
    return mul(s, fma(x, sub(splat(1.0), s), splat(1.0)))


@inline
def exp_neg(x):
    """exp(-x) for x >= 0, which is 0 beyond 87; FMA puts the rounding of x log2(e) right."""
    beyond, x = x, minimum(x, splat(87.0))
    t = mul(x, splat(-LOG2E))
    e = exp2_tame(t)
    rest = fma(x, splat(-LOG2E_REST), fma(x, splat(-LOG2E_HIGH), neg(t)))
    return zero_above(fma(mul(rest, splat(LN2)), e, e), beyond, splat(87.0))


@inline
def softplus(x):
    """max(x, 0) + log(1 + e), e = exp(-|x|), as 2 atanh(e / (2 + e)): exact to rounding for small results too."""
    e = exp_neg(maximum(x, neg(x)))
    s = div(e, add(e, splat(2.0)))
    w = mul(s, s)
    p = fma(fma(fma(splat(ATANH[3]), w, splat(ATANH[2])), w, splat(ATANH[1])), w, splat(ATANH[0]))
    return fma(mul(add(s, s), w), p, add(maximum(x, splat(0.0)), add(s, s)))


@function
def copy_floats(target, source, m):
    """Copies m floats from one address to another."""
    for i in range(m):
        put(target + FB * i, get(source + FB * i))


@inline
def load_row(address, m, spare):
    """LANES floats, of which the first m exist and the others are 0."""
    if m == LANES:
        return load(address)
    store(spare, splat(0.0))
    copy_floats(spare, address, m)
    return load(spare)


@inline
def store_row(address, x, m, spare):
    """Writes the first m lanes of x; ``spare`` is a vector of scratch memory."""
    if m == LANES:
        store(address, x)
    else:
        store(spare, x)
        copy_floats(address, spare, m)


@function
def load_tile(tile, source, m, N, factor):
    """Transposes m rows of N floats into N rows of LANES; lanes beyond m are 0, and what is finite stays so."""
    for n in range(N):
        store(tile + VB * n, splat(0.0))
        for i in range(m):
            x = get(source + FB * (i * N + n))
            y = x * factor
            if abs(x) <= F32_MAX:
                y = min(max(y, -F32_MAX), F32_MAX)
            put(tile + VB * n + FB * i, np.float32(y))


@function
def store_tile(target, tile, m, N, factor):
    """Transposes N rows of LANES, of which m lanes count, into m rows of N floats times factor."""
    for n in range(N):
        for i in range(m):
            put(target + FB * (i * N + n), np.float32(get(tile + VB * n + FB * i) * factor))


@function
def fill_tile(tile, rows, value):
    """Writes a value to every lane of so many rows."""
    for n in range(rows):
        store(tile + VB * n, splat(value))


@cache
def _stamp(*files: str) -> int:
    """A number for the content of this file and others."""
    digest = hashlib.sha256()
    for file in (__file__, *files):
        digest.update(Path(file).read_bytes())
    return int.from_bytes(digest.digest()[:4], 'little') + 1


def compile_worker(make: Callable[[int], Callable], params: np.dtype, *modules: str):
    """Compiles ``make(stamp)``, a worker, to a C function, from the on-disk cache where one can be written.

    Numba's cache notices edits of the worker's own file only. The stamp, which the worker uses, is part of the key:
    it changes with this file and with the named modules that the worker takes functions from.
    """
    worker = make(_stamp(*(sys.modules[module].__file__ for module in modules)))
    signature = types.void(types.CPointer(from_dtype(params)))
    options = dict(error_model='numpy', boundscheck=False)
    try:
        return compile_cached(worker, signature, **options)
    except (RuntimeError, OSError):  # Numba found no folder that it may write to
        return cfunc(signature, **options)(worker)
