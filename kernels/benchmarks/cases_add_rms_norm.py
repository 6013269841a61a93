"""Cases of residual addition with RMSNorm, shared by tests/kernels and the benchmarks."""

# T tokens, D channels

from __future__ import annotations

from dataclasses import dataclass

import torch
from tolerance import deviations
from torch import Tensor

from ssm_kernels import add_rms_norm


@dataclass(frozen=True)
class Case:
    """One call. ``ends``: which of the results have a gradient; ``view``: the inputs are halves of wider tensors."""

    label: str
    tokens: tuple[int, ...]
    D: int = 24
    added: bool = True
    eps: float = 1e-5
    ends: tuple[str, ...] = ('out', 'residual')
    view: bool = False

    def __str__(self) -> str:
        return self.label


CASES = (
    Case('one-token', tokens=(1,)),
    Case('no-tokens-dimension', tokens=()),
    Case('two-tokens-start', tokens=(1, 2), added=False),
    Case('three-tokens-D1', tokens=(3,), D=1, eps=0.5),
    Case('49-tokens-D-of-Vim', tokens=(1, 49), D=192),
    Case('49-tokens-start-D-past-a-tile', tokens=(2, 49), D=33, added=False),
    Case('197-tokens', tokens=(2, 197), D=40),
    Case('197-tokens-start-out-alone', tokens=(197,), D=7, added=False, ends=('out',)),
    Case('out-alone', tokens=(2, 17), D=65, ends=('out',)),
    Case('residual-alone', tokens=(2, 17), D=65, ends=('residual',)),
    Case('start-residual-alone', tokens=(5,), added=False, ends=('residual',)),
    Case('view', tokens=(2, 9), D=33, view=True),
    Case('start-view', tokens=(2, 9), D=16, added=False, view=True),
    Case('wide', tokens=(3,), D=1025),
    Case('large-epsilon', tokens=(4,), eps=10.0),
)


def make_inputs(case: Case, seed: int = 0) -> dict[str, Tensor | None]:
    """float64 tensors whose values are exact in bfloat16, so that every dtype gets the same numbers."""
    generator = torch.Generator().manual_seed(seed)

    def draw(*shape: int) -> Tensor:
        return torch.randn(*shape, generator=generator).bfloat16().double()

    return {
        'x': draw(*case.tokens, case.D),
        'residual': draw(*case.tokens, case.D) if case.added else None,
        'weight': draw(case.D),
    }


def run(case: Case, inputs: dict[str, Tensor | None], dtype: torch.dtype, backend: str) -> dict[str, Tensor]:
    """Outputs and gradients by name. Residual and weight stay in float32 where dtype is narrower."""
    wide = torch.float64 if dtype == torch.float64 else torch.float32
    leaves = {
        name: x.to(dtype if name == 'x' else wide).clone().requires_grad_()
        for name, x in inputs.items()
        if x is not None
    }
    cast = {'residual': None} | leaves
    if case.view:
        for name in ('x', 'residual'):
            if cast[name] is not None:
                cast[name] = torch.cat([cast[name], torch.full_like(cast[name], float('nan'))], -1)[..., : case.D]
    out, residual = add_rms_norm(**cast, eps=case.eps, backend=backend)
    outputs = {'out': out, 'residual': residual}
    generator = torch.Generator().manual_seed(1)
    seeds = {name: torch.randn(x.shape, generator=generator).bfloat16().to(x) for name, x in outputs.items()}
    grads = torch.autograd.grad(
        [outputs[name] for name in case.ends],
        list(leaves.values()),
        [seeds[name] for name in case.ends],
        allow_unused=True,
        materialize_grads=True,
    )
    return outputs | {f'd{name}': g for name, g in zip(leaves, grads, strict=True)}


def problems(case: Case, backend: str, dtype: torch.dtype = torch.float32, seed: int = 0) -> list[str]:
    """Results that are off by more than twice what plain PyTorch loses in this dtype, by name."""
    inputs = make_inputs(case, seed)
    exact, plain = (run(case, inputs, kind, 'torch') for kind in (torch.float64, dtype))
    return deviations(run(case, inputs, dtype, backend), plain, exact)
