"""Cases of the depthwise convolutions, shared by tests/kernels and the benchmarks."""

# K directions, B batch, L tokens, D channels, W width

from __future__ import annotations

from dataclasses import dataclass

import torch
from tolerance import deviations
from torch import Tensor

from ssm_kernels import bidirectional_causal_conv1d, causal_conv1d, same_conv1d


@dataclass(frozen=True)
class Case:
    """One call. ``padding``: 'causal', 'anticausal', 'both' or 'same'; ``view``: x is half of a wider tensor."""

    label: str
    L: int
    padding: str = 'both'
    D: int = 24
    W: int = 4
    batch: int = 2
    bias: bool = True
    silu: bool = True
    view: bool = False

    def __str__(self) -> str:
        return self.label


CASES = (
    Case('one-token-both', L=1),
    Case('one-token-same', L=1, padding='same', W=3),
    Case('two-tokens-causal', L=2, padding='causal'),
    Case('two-tokens-both-no-bias', L=2, bias=False),
    Case('three-tokens-anticausal', L=3, padding='anticausal'),
    Case('three-tokens-same-W4', L=3, padding='same'),
    Case('49-tokens-both-view', L=49, D=33, view=True),
    Case('49-tokens-both-W2', L=49, W=2, D=7),
    Case('49-tokens-both-W3-no-activation', L=49, W=3, D=40, silu=False),
    Case('49-tokens-causal-W2-no-options', L=49, padding='causal', W=2, bias=False, silu=False),
    Case('49-tokens-anticausal-W3-no-bias', L=49, padding='anticausal', W=3, bias=False, view=True),
    Case('49-tokens-same-W2-no-options', L=49, padding='same', W=2, bias=False, silu=False),
    Case('197-tokens-both-D-past-a-tile', L=197, D=65, batch=1),
    Case('197-tokens-causal-no-activation', L=197, padding='causal', D=5, batch=1, silu=False),
    Case('197-tokens-anticausal-W2-no-activation', L=197, padding='anticausal', W=2, D=17, batch=1, silu=False),
    Case('197-tokens-same-W3-view', L=197, padding='same', W=3, D=40, batch=1, view=True),
    Case('one-past-a-chunk-both', L=17, D=64),
    Case('one-past-two-chunks-causal-W3-view', L=33, padding='causal', W=3, D=96, view=True),
    Case('chunk-exactly-same', L=16, padding='same', D=32),
    Case('D1', L=20, D=1, batch=3),
)


def make_inputs(case: Case, seed: int = 0) -> dict[str, Tensor | None]:
    """float64 tensors whose values are exact in bfloat16, so that every dtype gets the same numbers."""
    generator = torch.Generator().manual_seed(seed)

    def draw(*shape: int) -> Tensor:
        return torch.randn(*shape, generator=generator).bfloat16().double()

    lead = (2,) if case.padding == 'both' else ()
    return {
        'x': draw(case.batch, case.L, case.D),
        'weight': draw(*lead, case.D, case.W),
        'bias': draw(*lead, case.D) if case.bias else None,
    }


def call(case: Case, x: Tensor, weight: Tensor, bias: Tensor | None, backend: str | None) -> Tensor:
    """The public function of the case."""
    options = dict(activation='silu' if case.silu else None, backend=backend)
    if case.padding == 'both':
        return bidirectional_causal_conv1d(x, weight, bias, **options)
    if case.padding == 'same':
        return same_conv1d(x, weight, bias, **options)
    return causal_conv1d(x, weight, bias, reverse=case.padding == 'anticausal', **options)


def run(case: Case, inputs: dict[str, Tensor | None], dtype: torch.dtype, backend: str) -> dict[str, Tensor]:
    """Output and gradients by name. Weight and bias stay in float32 where dtype is narrower."""
    wide = torch.float64 if dtype == torch.float64 else torch.float32
    cast = {
        name: x.to(dtype if name == 'x' else wide).clone().requires_grad_()
        for name, x in inputs.items()
        if x is not None
    }
    x = cast['x']
    if case.view:
        x = torch.cat([x, torch.full_like(x, float('nan'))], -1)[..., : case.D]
    y = call(case, x, cast['weight'], cast.get('bias'), backend)
    dy = torch.randn(y.shape, generator=torch.Generator().manual_seed(1)).bfloat16().to(y)
    grads = torch.autograd.grad(y, list(cast.values()), dy)
    return {'y': y} | {f'd{name}': g for name, g in zip(cast, grads, strict=True)}


def problems(case: Case, backend: str, dtype: torch.dtype = torch.float32, seed: int = 0) -> list[str]:
    """Results that are off by more than twice what plain PyTorch loses in this dtype, by name."""
    inputs = make_inputs(case, seed)
    exact, plain = (run(case, inputs, kind, 'torch') for kind in (torch.float64, dtype))
    return deviations(run(case, inputs, dtype, backend), plain, exact)
