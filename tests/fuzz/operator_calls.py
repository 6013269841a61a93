"""Random calls of all ops of ssm_kernels: drawn from a number, carried out on any backend, compared with float64.

A call is compared with plain PyTorch in the same dtype, whose error it may exceed three times, and with what a
rounding of the inputs does to the exact result, as single results of plain PyTorch are exact by luck.
"""

# K directions, B batch, L tokens, D channels, N state size, G groups of channels, R rank of dt, W width

from __future__ import annotations

import contextlib
import random
from collections.abc import Sequence
from dataclasses import dataclass, field

import torch
from torch import Tensor

import ssm_kernels as ops

# a decay or step below the smallest normal number may count as 0: 1.2e-38 times what it meets
UNDERFLOW = 1e-25
# how far from an overflow a result must be: sums on the way to it may be larger
MARGIN = 16
FLOOR = {torch.float64: 1e-12, torch.float32: 2e-6, torch.bfloat16: 4e-3, torch.float16: 5e-4}  # of the largest value
EXTREME = (0.0, -0.0, 1e-30, -1e-30, 1e-6, 20.0, -20.0, 88.0, -88.7, 100.0, -100.0, 1e4, -1e4, 1e30, -1e30)
LENGTHS = (1, 1, 2, 3, 4, 5, 7, 8, 9, 13, 16, 17, 31, 33, 63, 64, 65)
CHANNELS = (1, 2, 3, 5, 7, 8, 9, 15, 16, 17, 20, 31, 32, 33, 48)
STATES = (1, 1, 2, 3, 4, 5, 8, 16, 17)
LAYOUTS = ('whole', 'whole', 'transposed', 'sliced', 'strided', 'expanded', 'offset')


@dataclass
class Call:
    """One call: tensors in float64 by name, each with a layout, and the options."""

    number: int
    op: str
    dtype: torch.dtype
    backend: str | None
    values: dict[str, Tensor | None]
    layouts: dict[str, str]
    narrow: set[str]  # what is in dtype, where the other tensors may be float32
    trained: set[str]  # what asks for a gradient
    options: dict = field(default_factory=dict)
    autocast: bool = False

    def __str__(self) -> str:
        tensors = ', '.join(
            f'{name} {tuple(x.shape)} {self.layouts[name]}{" narrow" * (name in self.narrow)}'
            f'{" trained" * (name in self.trained)}'
            for name, x in self.values.items()
            if x is not None
        )
        return (
            f'call {self.number}: {self.op}({tensors}, {self.options}), {self.dtype}, backend {self.backend}'
            f'{", autocast" * self.autocast}'
        )


def shapes_of(op: str, dice: random.Random) -> tuple[dict[str, tuple[int, ...]], dict]:
    """Shapes of the tensors of an op and its options; a tensor that is left out is missing."""
    B, L, D, N = dice.choice((1, 1, 2, 3)), dice.choice(LENGTHS), dice.choice(CHANNELS), dice.choice(STATES)
    if dice.random() < 0.02:
        B, L, D = (0 if i == dice.randrange(3) else size for i, size in enumerate((B, L, D)))
    W, R, maybe = dice.randint(2, 4), dice.choice((1, 2, 3, 5)), lambda: dice.random() < 0.6
    flag = lambda: dice.random() < 0.5  # noqa: E731
    if op == 'add_rms_norm':
        lead = dice.choice(((L,), (B, L), (B, 2, L)))
        shapes = dict(x=(*lead, D), residual=(*lead, D), weight=(D,))
        optional, options = {'residual'}, dict(eps=dice.choice((0.0, 1e-5, 1e-6, 1.0)))
    elif 'conv1d' in op:
        lead = (2,) if op.startswith('bi') else ()
        shapes = dict(x=(B, L, D), weight=(*lead, D, W), bias=(*lead, D))
        optional, options = {'bias'}, dict(activation=dice.choice(('silu', None)))
        if op == 'causal_conv1d':
            options['reverse'] = flag()
    elif op == 'mamba_inner':
        both = flag()
        one = dict(conv=(D, W), conv_bias=(D,), x_proj=(R + 2 * N, D), dt_proj=(D, R), A=(D, N), D=(D,), dt_bias=(D,))
        shapes = dict(x=(B, L, D), z=(B, L, D))
        shapes |= {f'{name}{k}': shape for k in range(1 + both) for name, shape in one.items()}
        optional = {'z', *(f'{name}{k}' for k in (0, 1) for name in ('conv_bias', 'D', 'dt_bias'))}
        options = dict(scale=dice.choice((1.0, 0.5, -2.0)))
        if not both:
            options |= dice.choice((dict(), dict(reverse=True), dict(padding='same')))
    else:
        lead = (2,) if op.startswith('bi') else ()
        G = dice.choice([g for g in range(1, D + 1) if D % g == 0] or [1])
        kinds = (*lead, B, L, N), (*lead, B, L, G, N), (*lead, B, L, 1, N), (*lead, D, N)
        shapes = dict(u=(*lead, B, L, D), dt=(*lead, B, L, D), A=(*lead, D, N), B=dice.choice(kinds))
        shapes |= dict(C=dice.choice(kinds), D=(*lead, D), z=(B, L, D), dt_bias=(*lead, D))
        optional, options = {'D', 'z', 'dt_bias'}, dict(dt_softplus=flag())
        options |= dict(scale=dice.choice((1.0, 0.5, -2.0))) if lead else {}
        if op == 'selective_scan':
            options['reverse'] = flag()
    return {name: shape for name, shape in shapes.items() if name not in optional or maybe()}, options


OPS = (
    'selective_scan', 'bidirectional_selective_scan', 'selective_scan_fn', 'causal_conv1d', 'causal_conv1d_fn',
    'bidirectional_causal_conv1d', 'same_conv1d', 'add_rms_norm', 'mamba_inner',
)  # fmt: skip
WEIGHTS = ('conv', 'conv_bias', 'x_proj', 'dt_proj', 'A', 'D', 'dt_bias')


def draw(number: int) -> Call:
    """The call of this number."""
    dice = random.Random(number)
    noise = torch.Generator().manual_seed(number)
    op = dice.choice(OPS)
    shapes, options = shapes_of(op, dice)
    dtype = dice.choice((torch.float32, torch.float32, torch.bfloat16, torch.float16, torch.float64))
    activations = {'x', 'z', 'u', 'dt'} | ({'B', 'C'} if 'scan' in op else set())
    narrow, layouts, values = set(), {}, {}
    wild = dice.random() < 0.25
    for name, shape in shapes.items():
        per_token = name in activations and not (name in 'BC' and len(shape) == len(shapes['A']))
        if per_token or (dice.random() < 0.3 and not name.startswith('residual')):
            narrow.add(name)
        x = torch.randn(shape, generator=noise, dtype=torch.float64)
        x = x * dice.choice((1.0, 1.0, 1.0, 1e-3, 10.0) if wild else (1.0,))
        if name.rstrip('01') == 'A' and 'conv' not in op and not (wild and dice.random() < 0.2):
            x = -x.exp()
        if name in ('dt', 'dt_bias') and not options.get('dt_softplus', True) and not (wild and dice.random() < 0.2):
            x = x.abs()
        if wild and x.numel() and dice.random() < 0.3:
            for _ in range(dice.randint(1, 3)):
                x.view(-1)[dice.randrange(x.numel())] = dice.choice(EXTREME)
        layout = layouts[name] = dice.choice(LAYOUTS)
        if layout == 'expanded' and shape and shape[0]:
            axis = dice.randrange(len(shape))
            x = x.narrow(axis, 0, min(1, shape[axis])).expand(shape).contiguous()
            layouts[name] = f'expanded {axis}'
        narrowest = dtype if name in narrow else torch.float64 if dtype == torch.float64 else torch.float32
        limit = torch.finfo(narrowest).max
        values[name] = x.clamp(-limit, limit).to(narrowest).double()
    trained = {name for name in values if dice.random() < 0.6} if dice.random() < 0.7 else set()
    backend = dice.choice(('numba', 'numba', 'numba', None, 'torch'))
    if op.endswith('_fn') or dtype == torch.float64:
        backend = None
    autocast = dice.random() < 0.1
    return Call(number, op, dtype, backend, values, layouts, narrow, trained, options, autocast)


def laid_out(x: Tensor, layout: str) -> Tensor:
    """The same values with other strides."""
    if layout == 'transposed' and x.dim() > 1:
        return x.mT.contiguous().mT
    if layout in ('sliced', 'strided') and x.dim():
        axis, step = (0, 1) if layout == 'sliced' else (x.dim() - 1, 2)
        room = x.new_full([size * step + 1 if i == axis else size for i, size in enumerate(x.shape)], float('nan'))
        part = room.narrow(axis, 1, x.shape[axis] * step)
        part = part[..., ::2] if step == 2 else part
        return part.copy_(x)
    if layout.startswith('expanded '):
        axis = int(layout.split()[1])
        return x.narrow(axis, 0, min(1, x.shape[axis])).contiguous().expand(x.shape)
    if layout == 'offset':
        room = x.new_full((x.numel() + 3,), float('nan'))
        return room[3:].copy_(x.reshape(-1)).view(x.shape)
    return x.contiguous()


def carry_out(
    call: Call, dtype: torch.dtype, backend: str | None, plain: bool, noise: float = 0.0, seed: int = 1
) -> dict[str, Tensor]:
    """Outputs and gradients by name; plain for contiguous tensors and no function with another library's layout."""
    generator = torch.Generator().manual_seed(call.number + seed)
    given: dict[str, Tensor | None] = {}
    for name, value in call.values.items():
        wide = torch.float64 if dtype == torch.float64 else torch.float32
        if noise:
            value = value * (1 + noise * (2 * torch.rand(value.shape, generator=generator, dtype=value.dtype) - 1))
        x = value.to(dtype if name in call.narrow else wide)
        x = x.contiguous() if plain else laid_out(x, call.layouts[name])
        given[name] = x.detach().requires_grad_(name in call.trained)
    before = {name: x.detach().clone() for name, x in given.items()}
    context = torch.autocast('cpu', torch.bfloat16) if call.autocast else contextlib.nullcontext()
    with context:
        outputs = _apply(call, given, backend, plain)
    for name, x in given.items():
        if not torch.equal(x.detach().nan_to_num(), before[name].nan_to_num()):
            raise AssertionError(f'{name} was changed in place')
    results = {f'out{i}': x.detach() for i, x in enumerate(outputs)}
    roots = [x for x in outputs if x.requires_grad]
    if call.trained and roots:
        generator = torch.Generator().manual_seed(call.number)
        seeds = [torch.randn(x.shape, generator=generator).bfloat16().to(x) for x in roots]
        leaves = {name: given[name] for name in sorted(call.trained)}
        grads = torch.autograd.grad(roots, list(leaves.values()), seeds, allow_unused=True)
        results |= {f'd{name}': grad for name, grad in zip(leaves, grads, strict=True) if grad is not None}
    return results


def _apply(call: Call, t: dict[str, Tensor], backend: str | None, plain: bool) -> tuple[Tensor, ...]:
    o = call.options
    if call.op == 'add_rms_norm':
        return ops.add_rms_norm(t['x'], t.get('residual'), t['weight'], backend=backend, **o)
    if call.op == 'mamba_inner':
        ks = (0, 1) if 'A1' in t else (0,)
        weights = [ops.DirectionWeights(*(t.get(f'{name}{k}') for name in WEIGHTS)) for k in ks]
        return (ops.mamba_inner(t['x'], t.get('z'), weights, backend=backend, **o),)
    if call.op == 'causal_conv1d_fn' and not plain:
        return (ops.causal_conv1d_fn(t['x'].mT, t['weight'], t.get('bias'), **o).mT,)
    if 'conv1d' in call.op:
        op = getattr(ops, call.op.removesuffix('_fn'))
        return (op(t['x'], t['weight'], t.get('bias'), backend=backend, **o),)
    if call.op == 'bidirectional_selective_scan':
        return (ops.bidirectional_selective_scan(**t, backend=backend, **o),)
    if call.op == 'selective_scan':
        return ops.selective_scan(**t, return_last_state=True, backend=backend, **o)
    if plain:
        return ops.selective_scan(**t, return_last_state=True, backend=backend, dt_softplus=o['dt_softplus'])
    t = {name: x if name in ('A', 'D', 'dt_bias') or x.dim() == 2 else x.movedim(1, -1) for name, x in t.items()}
    rest = t.get('D'), None if 'z' not in t else t['z'], t.get('dt_bias'), o['dt_softplus']
    y, state = ops.selective_scan_fn(t['u'], t['dt'], t['A'], t['B'], t['C'], *rest, return_last_state=True)
    return y.mT, state


def problems(call: Call) -> list[str]:
    """What is wrong with a call, in words; nothing if all is well."""
    if any(0 in x.shape for x in call.values.values()):
        try:
            carry_out(call, call.dtype, call.backend, plain=False)
        except ValueError as error:
            return [] if 'every size must be at least 1' in str(error) else [f'{call}: {error}']
        return [f'{call}: a size of zero was accepted']
    try:
        ours = carry_out(call, call.dtype, call.backend, plain=False)
    except Exception as error:
        return [f'{call}: {type(error).__name__}: {error}']
    exact = carry_out(call, torch.float64, 'torch', plain=True)
    plain = carry_out(call, call.dtype, 'torch', plain=True)
    found = []
    if ours.keys() != plain.keys():
        return [f'{call}: results {sorted(ours)}, must be {sorted(plain)}']
    suspects = [name for name in ours if _differs(ours[name], plain[name], exact[name])]
    if suspects:
        kind = torch.bfloat16 if call.autocast else torch.promote_types(call.dtype, torch.float32)
        eps = torch.finfo(kind).eps
        shaken = [carry_out(call, torch.float64, 'torch', plain=True, noise=eps, seed=seed) for seed in range(1, 9)]
        for name in suspects:
            words = _differs(ours[name], plain[name], exact[name], [x[name] for x in shaken])
            found += [f'{call}: {name}: {words}'] if words else []
    return found


def _differs(ours: Tensor, plain: Tensor, exact: Tensor, shaken: Sequence[Tensor] = ()) -> str:
    if ours.dtype != plain.dtype or ours.shape != plain.shape:
        return f'{ours.dtype} {tuple(ours.shape)}, must be {plain.dtype} {tuple(plain.shape)}'
    fine = plain.isfinite() & (exact.abs() < torch.finfo(torch.float32).max / MARGIN)  # NaN is not below
    if not ours[fine].isfinite().all():
        worst = plain[fine & ~ours.isfinite()][:1].item()
        return f'{int((fine & ~ours.isfinite()).sum())} values are not finite, where plain PyTorch has {worst:.3g}'
    if not fine.any():
        return ''
    truth = exact[fine]
    off = (ours[fine].double() - truth).abs().max().item()
    losses = [3 * (x[fine].double() - truth).abs().nan_to_num(0.0).max().item() for x in (plain, *shaken)]
    allowed = max(*losses, FLOOR[ours.dtype] * truth.abs().max().item(), UNDERFLOW)
    return '' if off <= allowed else f'error {off:.3g}, allowed {allowed:.3g}, largest value {truth.abs().max():.3g}'
