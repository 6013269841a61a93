"""Values of the elementary functions of ``cpu_vectors``: run as a program, so that Numba compiles for a chosen CPU.

``python vector_values.py INPUTS.npy OUTPUTS.npz`` evaluates every function. With ``emulate-avx512`` behind it, the
vectors are those of AVX-512 on any CPU: LLVM splits them, and only the look-up in a register of 16, which no other CPU
has, is emitted lane by lane.
"""

from __future__ import annotations

import sys

import numpy as np
from llvmlite import ir
from numba.core.registry import cpu_target

DOMAINS = {'exp2_tame': (-126.0, 126.0), 'exp_neg': (0.0, np.inf)}  # of functions that do not take every float


def as_avx512(codegen):
    """Makes ``cpu_vectors``, imported after this, believe in AVX-512."""
    name, cpu, features = codegen.magic_tuple()
    codegen.magic_tuple = lambda: (name, cpu, f'{features},+avx512f')


def permute_by_lanes(builder, table, index):
    result = ir.Constant(table.type, ir.Undefined)
    for lane in range(index.type.count):
        number = ir.Constant(ir.IntType(32), lane)
        entry = builder.and_(builder.extract_element(index, number), ir.Constant(ir.IntType(32), table.type.count - 1))
        result = builder.insert_element(result, builder.extract_element(table, entry), number)
    return result


def evaluate(x: np.ndarray) -> dict[str, np.ndarray]:
    """Every function of x, float32 of any length, and the number of lanes; x outside a domain is moved into it."""
    from ssm_kernels import cpu_vectors as v

    names = ('exp2', 'exp2_tame', 'sigmoid', 'silu', 'silu_slope', 'exp_neg', 'softplus')
    found = {'lanes': np.array(v.LANES)}
    for name in names:
        function, VB, LANES, load, store = getattr(v, name), v.VB, v.LANES, v.load, v.store

        @v.function
        def run(source, target, n, function=function, VB=VB, LANES=LANES, load=load, store=store):
            for i in range(n // LANES):
                store(target + VB * i, function(load(source + VB * i)))

        padded = np.zeros(-(-len(x) // LANES) * LANES, np.float32)
        padded[: len(x)] = np.clip(x, *DOMAINS.get(name, (-np.inf, np.inf)))
        y = np.full_like(padded, np.nan)
        run(padded.ctypes.data, y.ctypes.data, len(padded))
        found[name] = y[: len(x)]
    return found


if __name__ == '__main__':
    if 'emulate-avx512' in sys.argv:
        as_avx512(cpu_target.target_context.codegen())
        from ssm_kernels import cpu_vectors

        assert cpu_vectors.HALF == 16 and cpu_vectors.PERMUTE
        cpu_vectors._emit_permute = permute_by_lanes
    np.savez(sys.argv[2], **evaluate(np.load(sys.argv[1])))
