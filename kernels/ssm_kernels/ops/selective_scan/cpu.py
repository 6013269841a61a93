"""The selective scan on a CPU: host side of the Numba kernel and the PyTorch custom operators."""

# K directions (1 or 2), B batch, L tokens, D channels, N state size, G groups of channels

from __future__ import annotations

import torch
from torch import Tensor

from ...cpu_threads import address, empty, rows, whole
from . import cpu_kernel
from .autograd import define_scan

SLAB = 6  # tiles that one forward task takes where there are enough tasks for all threads


class _Inputs:
    """The tensors as the kernel reads them, kept alive, and the fields of its parameter block."""

    def __init__(self, u, dt, A, B, C, D, z, dt_bias, dt_softplus, reverse, scale):
        self.const_b, self.const_c = B.dim() == 3, C.dim() == 3
        self.K, self.B, self.L, self.D = u.shape
        self.N = A.shape[-1]
        self.groups_b, self.groups_c = (1 if x.dim() == 3 else x.shape[3] for x in (B, C))
        self.G = max(self.groups_b, self.groups_c)
        self.chunks = -(-self.L // cpu_kernel.CH)
        u, dt, z, A, D, dt_bias = rows(u), rows(dt), rows(z), whole(A), whole(D), whole(dt_bias)
        B = whole(B) if self.const_b else rows(B)
        C = whole(C) if self.const_c else rows(C)
        self.tensors = u, dt, z, A, B, C, D, dt_bias
        self.fields = fields = {
            'K': self.K, 'B': self.B, 'L': self.L, 'D': self.D, 'N': self.N, 'G': self.G, 'chunks': self.chunks,
            'reverse': reverse, 'softplus': dt_softplus, 'const_b': self.const_b, 'const_c': self.const_c,
            'scale': scale, 'A': address(A), 'skip': address(D), 'bias': address(dt_bias), 'u': address(u),
            'dt': address(dt), 'z': address(z), 'Bq': address(B), 'Cq': address(C),
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
    u: Tensor, dt: Tensor, A: Tensor, B: Tensor, C: Tensor, D: Tensor | None, z: Tensor | None, dt_bias: Tensor | None,
    dt_softplus: bool, reverse: bool, scale: float, save_states: bool,
) -> tuple[Tensor, Tensor, Tensor]:  # fmt: skip
    x = _Inputs(u, dt, A, B, C, D, z, dt_bias, dt_softplus, reverse, scale)
    out, last = empty(x.B, x.L, x.D), empty(x.K, x.B, x.D, x.N)
    states = empty(x.K * x.B * x.chunks * x.N * x.D if save_states else 0)
    fields = x.fields | dict(
        out=out.data_ptr(), last=last.data_ptr(), save=save_states, states=states.data_ptr() if save_states else 0
    )
    tiles = -(-x.D // x.G // cpu_kernel.LANES)
    slab = max(1, min(SLAB, x.B * x.G * tiles // (4 * torch.get_num_threads())))
    slabs = -(-tiles // slab)
    cpu_kernel.forward(cpu_kernel.forward_scratch_bytes(x.N, slab), x.B * x.G * slabs, fields | dict(slab=slab))
    return out.to(u.dtype), last, states


def _backward(
    dy: Tensor | None, dlast: Tensor | None,
    u: Tensor, dt: Tensor, A: Tensor, B: Tensor, C: Tensor, D: Tensor | None, z: Tensor | None, dt_bias: Tensor | None,
    states: Tensor, dt_softplus: bool, reverse: bool, scale: float,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor]:  # fmt: skip
    x = _Inputs(u, dt, A, B, C, D, z, dt_bias, dt_softplus, reverse, scale)
    slabs = -(-x.D // x.G // (cpu_kernel.LANES * cpu_kernel.SLAB))
    dy = torch.zeros(x.B, x.L, x.D) if dy is None else whole(dy)
    dlast = whole(dlast)
    du, ddt = empty(*u.shape), empty(*u.shape)
    dz = empty(*(() if z is None else z.shape))
    dA = empty(x.B, x.K, x.D, x.N)
    dskip, dbias = empty(x.B, x.K, x.D), empty(x.B, x.K, x.D)
    shape = (x.B, x.K, x.D, x.N)
    token_wise = (slabs, x.K, x.B, x.L, x.G, x.N)
    dB = empty(*(shape if x.const_b else token_wise))
    dC = empty(*(shape if x.const_c else token_wise))
    fields = x.fields | dict(
        dout=dy.data_ptr(), dlast=address(dlast), states=states.data_ptr(), du=du.data_ptr(), ddt=ddt.data_ptr(),
        dz=dz.data_ptr(), dA=dA.data_ptr(), dB=dB.data_ptr(), dC=dC.data_ptr(), dB_const=dB.data_ptr(),
        dC_const=dC.data_ptr(), dskip=dskip.data_ptr(), dbias=dbias.data_ptr(),
        slab_bytes=4 * x.K * x.B * x.L * x.G * x.N,
    )  # fmt: skip
    cpu_kernel.backward(cpu_kernel.backward_scratch_bytes(x.N), x.B * x.G * slabs, fields)

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


forward_op, backward_op, selective_scan_numba = define_scan(
    'numba', _forward, _backward, block=cpu_kernel.CH, dispatch_key='CPU'
)
