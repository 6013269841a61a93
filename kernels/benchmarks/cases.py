"""Cases of the selective scan, shared by tests/kernels and the benchmarks, and how close a backend must come."""

# K directions, B batch, L tokens, D channels, N state size, G groups of channels

from __future__ import annotations

from dataclasses import dataclass

import torch
import torch.nn.functional as F
from tolerance import deviations, error  # noqa: F401  (tests and benchmarks take error from here)
from torch import Tensor

from ssm_kernels import bidirectional_selective_scan, selective_scan


@dataclass(frozen=True)
class Case:
    """One call: ``both`` for the bidirectional function, ``G`` = 0 for B and C without a group dimension."""

    label: str
    L: int
    D: int = 24
    N: int = 8
    batch: int = 2
    both: bool = False
    G: int = 0
    const_b: bool = False
    const_c: bool = False
    skip: bool = True
    gate: bool = True
    bias: bool = True
    softplus: bool = True
    reverse: bool = False
    scale: float = 1.0

    def __str__(self) -> str:
        return self.label


CASES = (
    Case('one-token', L=1),
    Case('two-tokens-both', L=2, both=True),
    Case('three-tokens-reverse', L=3, reverse=True),
    Case('49-tokens-D-below-a-tile', L=49, D=5),
    Case('197-tokens-both-N16-D-past-a-tile', L=197, D=33, N=16, batch=1, both=True, scale=0.5),
    Case('chunk-exactly', L=64, D=32, N=16),
    Case('one-past-a-chunk-both', L=65, D=40, N=16, both=True),
    Case('one-past-two-chunks-reverse', L=129, D=16, N=16, reverse=True),
    Case('D-past-a-slab', L=66, D=150, N=4, batch=1, both=True),
    Case('N1', L=49, D=17, N=1),
    Case('N17-both', L=70, D=20, N=17, both=True),
    Case('N64', L=67, D=20, N=64, batch=1, reverse=True),
    Case('no-options', L=66, skip=False, gate=False, bias=False, softplus=False),
    Case('no-options-both', L=66, both=True, skip=False, gate=False, bias=False, softplus=False),
    Case('only-skip', L=49, gate=False, bias=False, softplus=False),
    Case('only-gate-both', L=49, both=True, skip=False, bias=False, softplus=False, scale=2.0),
    Case('only-bias', L=49, skip=False, gate=False, softplus=False),
    Case('only-softplus', L=49, skip=False, gate=False, bias=False),
    Case('one-group', L=66, G=1),
    Case('three-groups', L=66, D=60, N=5, G=3),
    Case('groups-of-one-channel-both', L=49, D=6, N=3, G=6, both=True),
    Case('constant-B', L=66, D=36, const_b=True),
    Case('constant-C-both', L=66, D=36, const_c=True, both=True),
    Case('constant-B-and-C', L=66, D=36, const_b=True, const_c=True, reverse=True),
    Case('constant-B-grouped-C', L=66, D=36, G=2, const_b=True),
    Case('grouped-B-constant-C-both', L=66, D=36, G=2, const_c=True, both=True),
)


def make_inputs(case: Case, seed: int = 0) -> dict[str, Tensor]:
    """float64 tensors whose values are exact in bfloat16, so that every dtype gets the same numbers."""
    generator = torch.Generator().manual_seed(seed)

    def draw(*shape: int) -> Tensor:
        return torch.randn(*shape, generator=generator)

    lead = (2,) if case.both else ()
    tokens = (*lead, case.batch, case.L)
    row = (*tokens, case.G, case.N) if case.G else (*tokens, case.N)
    weight = (*lead, case.D, case.N)
    inputs = {
        'u': draw(*tokens, case.D),
        'dt': 0.5 * draw(*tokens, case.D) - (1.0 if case.softplus else 0.0),
        'A': -torch.exp(draw(*weight)),
        'B': draw(*(weight if case.const_b else row)),
        'C': draw(*(weight if case.const_c else row)),
        'D': draw(*lead, case.D) if case.skip else None,
        'z': draw(case.batch, case.L, case.D) if case.gate else None,
        'dt_bias': draw(*lead, case.D) if case.bias else None,
    }
    if not case.softplus:
        inputs['dt'] = inputs['dt'].abs()
        inputs['dt_bias'] = None if inputs['dt_bias'] is None else inputs['dt_bias'].abs()
    return {name: None if x is None else x.bfloat16().double() for name, x in inputs.items()}


def run(case: Case, inputs: dict[str, Tensor], dtype: torch.dtype, backend: str) -> dict[str, Tensor]:
    """Outputs and gradients by name. A, D and dt_bias stay in float32 where dtype is narrower."""
    wide = torch.float64 if dtype == torch.float64 else torch.float32
    cast = {}
    for name, x in inputs.items():
        narrow = name in ('u', 'dt', 'z') or (name in 'BC' and x.dim() > 2 + case.both)
        cast[name] = None if x is None else x.to(dtype if narrow else wide).clone().requires_grad_()
    if case.both:
        y = bidirectional_selective_scan(**cast, dt_softplus=case.softplus, scale=case.scale, backend=backend)
        outputs = {'y': y}
    else:
        y, state = selective_scan(
            **cast, dt_softplus=case.softplus, reverse=case.reverse, return_last_state=True, backend=backend
        )
        outputs = {'y': y, 'last_state': state}
    generator = torch.Generator().manual_seed(1)
    seeds = [torch.randn(x.shape, generator=generator).bfloat16().to(x) for x in outputs.values()]
    given = {name: x for name, x in cast.items() if x is not None}
    grads = torch.autograd.grad(list(outputs.values()), list(given.values()), seeds)
    return outputs | {f'd{name}': g for name, g in zip(given, grads, strict=True)}


def problems(case: Case, backend: str, dtype: torch.dtype = torch.float32, seed: int = 0) -> list[str]:
    """Outputs and gradients that are off by more than twice what plain PyTorch loses in this dtype, by name."""
    inputs = make_inputs(case, seed)
    exact = run(case, inputs, torch.float64, 'torch')
    plain = run(case, inputs, dtype, 'torch')
    ours = run(case, inputs, dtype, backend)
    return deviations(ours, plain, exact)


def yardstick(
    u: Tensor, delta: Tensor, A: Tensor, B: Tensor, C: Tensor, D: Tensor, z: Tensor, delta_bias: Tensor
) -> Tensor:
    """The eager loop that speed-ups are quoted against, channels first: u, delta, z (B, D, L); B, C (B, N, L)."""
    delta = F.softplus(delta + delta_bias[:, None])
    state = u.new_zeros(u.shape[0], u.shape[1], A.shape[1])
    outputs = []
    for step in range(u.shape[2]):
        dt = delta[:, :, step, None]
        state = torch.exp(dt * A) * state + (dt * u[:, :, step, None]) * B[:, None, :, step]
        outputs.append(torch.einsum('bdn,bn->bd', state, C[:, :, step]))
    y = torch.stack(outputs, dim=-1) + u * D[:, None]
    return y * F.silu(z)
