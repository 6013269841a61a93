"""The selective scan on a CPU: host side of the Numba kernel, threads, and the PyTorch custom operators.

The workers run on the OpenMP threads that PyTorch itself uses, called by address, and not in Numba's threading layer:
as many as ``torch.get_num_threads()`` says, safe from several Python threads, and nothing global changes for the user's
other Numba code. Where PyTorch has no such OpenMP, and in a forked child (OpenMP threads do not survive a fork), they
run on Python threads, which the kernel leaves free of the interpreter lock.
"""

# K directions (1 or 2), B batch, L tokens, D channels, N state size, G groups of channels

from __future__ import annotations

import ctypes
import os
import struct
import threading
from collections.abc import Callable
from functools import lru_cache
from pathlib import Path

import torch
from torch import Tensor

from . import cpu_kernel

SLAB = 6  # tiles that one forward task takes where there are enough tasks for all threads

_compile_lock = threading.Lock()
_workers: dict[str, tuple[object, Callable]] = {}
_WORKER_TYPE = ctypes.CFUNCTYPE(None, ctypes.c_void_p)
_PACK = struct.Struct(f'{len(cpu_kernel.WORDS)}qd')  # cpu_kernel.PARAMS
_forked = False


def _after_fork() -> None:
    global _forked, _compile_lock
    _forked, _compile_lock = True, threading.Lock()


if hasattr(os, 'register_at_fork'):
    os.register_at_fork(after_in_child=_after_fork)


def _empty(*shape: int) -> Tensor:
    """All memory of this backend comes from here, so that tests can poison it."""
    return torch.empty(shape, dtype=torch.float32)


@lru_cache(maxsize=1)
def _openmp() -> Callable | None:
    """GOMP_parallel of the OpenMP library that PyTorch is linked with."""
    for name in ('libtorch_cpu.so', 'libtorch_cpu.dylib'):
        path = Path(torch.__file__).parent / 'lib' / name
        try:
            entry = ctypes.CDLL(str(path)).GOMP_parallel
        except (OSError, AttributeError):
            continue
        entry.argtypes = [_WORKER_TYPE, ctypes.c_void_p, ctypes.c_uint, ctypes.c_uint]
        entry.restype = None
        return entry
    return None


def _worker(name: str) -> Callable:
    """The compiled worker as a ctypes function, which gives the interpreter lock away while it runs."""
    if name not in _workers:
        with _compile_lock:
            if name not in _workers:
                compiled = cpu_kernel.compile_worker(getattr(cpu_kernel, name))
                _workers[name] = compiled, _WORKER_TYPE(compiled.address)
    return _workers[name][1]


def _run(name: str, scratch_bytes: int, n_tasks: int, fields: dict[str, int | float]) -> None:
    """Runs the worker on up to torch.get_num_threads() threads; they share out the tasks themselves."""
    worker = _worker(name)
    threads = max(1, min(torch.get_num_threads(), n_tasks))
    stride = (scratch_bytes + 127) // 64 * 64
    scratch = _empty(threads * stride // 4 + 16)
    fields |= {'n_tasks': n_tasks, 'scratch': (scratch.data_ptr() + 63) // 64 * 64, 'scratch_bytes': stride}
    block = ctypes.create_string_buffer(
        _PACK.pack(*[fields.get(word, 0) for word in cpu_kernel.WORDS], fields['scale']), _PACK.size
    )
    params = ctypes.addressof(block)
    parallel = None if _forked else _openmp()
    if threads == 1:
        worker(params)
    elif parallel is not None:
        parallel(worker, params, threads, 0)
    else:
        others = [threading.Thread(target=worker, args=(params,)) for _ in range(threads - 1)]
        for thread in others:
            thread.start()
        worker(params)
        for thread in others:
            thread.join()


def _rows(x: Tensor | None) -> Tensor | None:
    """float32 with neighbouring channels (or states) next to each other; other strides are free."""
    if x is None:
        return None
    x = x if x.dtype == torch.float32 else x.float()
    return x if x.stride(-1) == 1 or x.shape[-1] == 1 else x.contiguous()


def _whole(x: Tensor | None) -> Tensor | None:
    return None if x is None else x.to(torch.float32).contiguous()


def _address(x: Tensor | None) -> int:
    return 0 if x is None else x.data_ptr()


class _Inputs:
    """The tensors as the kernel reads them, kept alive, and the fields of its parameter block."""

    def __init__(self, u, dt, A, B, C, D, z, dt_bias, dt_softplus, reverse, scale):
        self.const_b, self.const_c = B.dim() == 3, C.dim() == 3
        self.K, self.B, self.L, self.D = u.shape
        self.N = A.shape[-1]
        self.groups_b, self.groups_c = (1 if x.dim() == 3 else x.shape[3] for x in (B, C))
        self.G = max(self.groups_b, self.groups_c)
        self.chunks = -(-self.L // cpu_kernel.CH)
        u, dt, z, A, D, dt_bias = _rows(u), _rows(dt), _rows(z), _whole(A), _whole(D), _whole(dt_bias)
        B = _whole(B) if self.const_b else _rows(B)
        C = _whole(C) if self.const_c else _rows(C)
        self.tensors = u, dt, z, A, B, C, D, dt_bias
        self.fields = fields = {
            'K': self.K, 'B': self.B, 'L': self.L, 'D': self.D, 'N': self.N, 'G': self.G, 'chunks': self.chunks,
            'reverse': reverse, 'softplus': dt_softplus, 'const_b': self.const_b, 'const_c': self.const_c,
            'scale': scale, 'A': _address(A), 'skip': _address(D), 'bias': _address(dt_bias), 'u': _address(u),
            'dt': _address(dt), 'z': _address(z), 'Bq': _address(B), 'Cq': _address(C),
        }  # fmt: skip
        for name, x in (('u', u), ('dt', dt)):
            k, b, step, _ = x.stride()
            fields[f'{name}_k'], fields[f'{name}_b'], fields[f'{name}_l'] = 4 * k, 4 * b, 4 * step
        if z is not None:
            fields['z_b'], fields['z_l'] = 4 * z.stride(0), 4 * z.stride(1)
        for name, x, groups in (('B', B, self.groups_b), ('C', C, self.groups_c)):
            if x.dim() == 5:
                k, b, step, g, _ = x.stride()
                fields[f'{name}_k'], fields[f'{name}_b'], fields[f'{name}_l'] = 4 * k, 4 * b, 4 * step
                fields[f'{name}_g'] = 4 * g if groups > 1 else 0


def _forward(
    u: Tensor,
    dt: Tensor,
    A: Tensor,
    B: Tensor,
    C: Tensor,
    D: Tensor | None,
    z: Tensor | None,
    dt_bias: Tensor | None,
    dt_softplus: bool,
    reverse: bool,
    scale: float,
    save_states: bool,
) -> tuple[Tensor, Tensor, Tensor]:
    x = _Inputs(u, dt, A, B, C, D, z, dt_bias, dt_softplus, reverse, scale)
    out, last = _empty(x.B, x.L, x.D), _empty(x.K, x.B, x.D, x.N)
    states = _empty(x.K, x.B, x.chunks, x.N, x.D) if save_states else _empty(0)
    fields = x.fields | dict(
        out=out.data_ptr(), last=last.data_ptr(), save=save_states, states=states.data_ptr() if save_states else 0
    )
    tiles = -(-x.D // x.G // cpu_kernel.LANES)
    slab = max(1, min(SLAB, x.B * x.G * tiles // (4 * torch.get_num_threads())))
    slabs = -(-tiles // slab)
    _run('forward', cpu_kernel.forward_scratch_bytes(x.N, slab), x.B * x.G * slabs, fields | dict(slab=slab))
    return out.to(u.dtype), last, states


def _backward(
    dout: Tensor | None,
    dlast: Tensor | None,
    u: Tensor,
    dt: Tensor,
    A: Tensor,
    B: Tensor,
    C: Tensor,
    D: Tensor | None,
    z: Tensor | None,
    dt_bias: Tensor | None,
    states: Tensor,
    dt_softplus: bool,
    reverse: bool,
    scale: float,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor]:
    x = _Inputs(u, dt, A, B, C, D, z, dt_bias, dt_softplus, reverse, scale)
    slabs = -(-x.D // x.G // (cpu_kernel.LANES * cpu_kernel.SLAB))
    dout = torch.zeros(x.B, x.L, x.D) if dout is None else _whole(dout)
    dlast = _whole(dlast)
    du, ddt = _empty(*u.shape), _empty(*u.shape)
    dz = _empty(*(() if z is None else z.shape))
    dA = _empty(x.B, x.K, x.D, x.N)
    dskip, dbias = _empty(x.B, x.K, x.D), _empty(x.B, x.K, x.D)
    shape = (x.B, x.K, x.D, x.N)
    token_wise = (slabs, x.K, x.B, x.L, x.G, x.N)
    dB = _empty(*(shape if x.const_b else token_wise))
    dC = _empty(*(shape if x.const_c else token_wise))
    fields = x.fields | dict(
        dout=dout.data_ptr(), dlast=_address(dlast), states=states.data_ptr(), du=du.data_ptr(), ddt=ddt.data_ptr(),
        dz=dz.data_ptr(), dA=dA.data_ptr(), dB=dB.data_ptr(), dC=dC.data_ptr(), dB_const=dB.data_ptr(),
        dC_const=dC.data_ptr(), dskip=dskip.data_ptr(), dbias=dbias.data_ptr(),
        slab_bytes=4 * x.K * x.B * x.L * x.G * x.N,
    )  # fmt: skip
    _run('backward', cpu_kernel.backward_scratch_bytes(x.N), x.B * x.G * slabs, fields)

    def finish(partial: Tensor, like: Tensor, groups: int = 0) -> Tensor:
        total = partial.sum(0) if partial.shape[0] > 1 else partial[0]
        if groups == 1 and x.G > 1:
            total = total.sum(3, keepdim=True)
        return total.to(like.dtype)

    return (
        du.to(u.dtype),
        ddt.to(dt.dtype),
        finish(dA, A),
        finish(dB, B, 0 if x.const_b else x.groups_b),
        finish(dC, C, 0 if x.const_c else x.groups_c),
        u.new_empty(0) if D is None else finish(dskip, D),
        u.new_empty(0) if z is None else dz.to(z.dtype),
        u.new_empty(0) if dt_bias is None else finish(dbias, dt_bias),
    )


_TENSORS = 'Tensor u, Tensor dt, Tensor A, Tensor B, Tensor C, Tensor? D, Tensor? z, Tensor? dt_bias'
_OPTIONS = 'bool dt_softplus, bool reverse, float scale'
forward_op = torch.library.custom_op(
    'ssm_kernels::selective_scan_numba',
    _forward,
    mutates_args=(),
    device_types='cpu',
    schema=f'({_TENSORS}, {_OPTIONS}, bool save_states) -> (Tensor, Tensor, Tensor)',
)
backward_op = torch.library.custom_op(
    'ssm_kernels::selective_scan_numba_backward',
    _backward,
    mutates_args=(),
    device_types='cpu',
    schema=f'(Tensor? dout, Tensor? dlast, {_TENSORS}, Tensor states, {_OPTIONS}) -> ({", ".join(["Tensor"] * 8)})',
)


@forward_op.register_fake
def _forward_fake(u, dt, A, B, C, D, z, dt_bias, dt_softplus, reverse, scale, save_states):
    K, batch, L, dim = u.shape
    N = A.shape[-1]
    chunks = (L + cpu_kernel.CH - 1) // cpu_kernel.CH
    return (
        u.new_empty(batch, L, dim),
        u.new_empty(K, batch, dim, N, dtype=torch.float32),
        u.new_empty(*((K, batch, chunks, N, dim) if save_states else (0,)), dtype=torch.float32),
    )


@backward_op.register_fake
def _backward_fake(dout, dlast, u, dt, A, B, C, D, z, dt_bias, states, dt_softplus, reverse, scale):
    return tuple(u.new_empty(0) if x is None else torch.empty_like(x, memory_format=torch.contiguous_format)
                 for x in (u, dt, A, B, C, D, z, dt_bias))  # fmt: skip


def _setup_context(ctx, inputs, output):
    *tensors, dt_softplus, reverse, scale, save_states = inputs
    ctx.set_materialize_grads(False)
    ctx.options = dt_softplus, reverse, scale
    ctx.saved = save_states
    ctx.save_for_backward(*tensors, output[2])


def _autograd(ctx, dout, dlast, dstates):
    *tensors, states = ctx.saved_tensors
    if not ctx.saved:
        raise RuntimeError('selective_scan_numba: backward needs save_states=True in the forward call')
    grads = backward_op(dout, dlast, *tensors, states, *ctx.options)
    return (*(None if x is None else g for x, g in zip(tensors, grads, strict=True)), None, None, None, None)


forward_op.register_autograd(_autograd, setup_context=_setup_context)


def selective_scan_numba(
    u: Tensor,
    dt: Tensor,
    A: Tensor,
    B: Tensor,
    C: Tensor,
    D: Tensor | None = None,
    z: Tensor | None = None,
    dt_bias: Tensor | None = None,
    dt_softplus: bool = False,
    reverse: bool = False,
    scale: float = 1.0,
) -> tuple[Tensor, Tensor]:
    """As :func:`selective_scan_reference`, with B and C (K, B, L, G, N) or (K, D, N); states are kept if needed."""
    tensors = (u, dt, A, B, C, D, z, dt_bias)
    save_states = torch.is_grad_enabled() and any(x is not None and x.requires_grad for x in tensors)
    return forward_op(*tensors, dt_softplus, reverse, scale, save_states)[:2]
