"""Formulas for what mmengine's FlopAnalyzer does not count: the operators of ssm_kernels, and fused attention.

As mmengine counts, one multiplication with its addition is one. Elementwise work is left out, as there.
"""

# B batch, L tokens, D channels, N state size, R rank of dt, W width, K directions

from math import prod

import torch
from mmengine.analysis import FlopAnalyzer
from torch import nn

# Per channel, state and token: decay times state, input times step, and the read-out.
SCAN = 3


def _sizes(value: torch._C.Value) -> list[int]:
    return value.type().sizes()


def attention(inputs: list[torch._C.Value], outputs: list[torch._C.Value]) -> int:
    """Both products of scaled_dot_product_attention: q (B, H, L, E), k and v (B, H, S, E)."""
    (*heads, length, width), keys = _sizes(inputs[0]), _sizes(inputs[1])
    return 2 * prod(heads) * length * keys[-2] * width


def selective_scan(inputs: list[torch._C.Value], outputs: list[torch._C.Value]) -> int:
    """u (K, B, L, D) and A (K, D, N): linear in the tokens."""
    return SCAN * prod(_sizes(inputs[0])) * _sizes(inputs[2])[-1]


def causal_conv1d(inputs: list[torch._C.Value], outputs: list[torch._C.Value]) -> int:
    """x (B, L, D) and weight (K, D, W)."""
    directions, _, width = _sizes(inputs[1])
    return prod(_sizes(inputs[0])) * directions * width


def mamba_inner(inputs: list[torch._C.Value], outputs: list[torch._C.Value]) -> int:
    """Convolution, x_proj, dt_proj and scan of every direction; x (B, L, D), then z, then the weights' list."""
    weights = list(inputs[2].node().inputs())
    per_value = 0
    for first in range(0, len(weights), 7):
        conv, _, x_proj, dt_proj, A = weights[first : first + 5]
        per_value += _sizes(conv)[1] + _sizes(x_proj)[0] + _sizes(dt_proj)[1] + SCAN * _sizes(A)[1]
    return prod(_sizes(inputs[0])) * per_value


HANDLES = {'aten::scaled_dot_product_attention': attention} | {
    f'ssm_kernels::{op.__name__}_{backend}': op
    for op in (selective_scan, causal_conv1d, mamba_inner)
    for backend in ('numba', 'triton')
}


def analyzer(model: nn.Module, *inputs: torch.Tensor) -> FlopAnalyzer:
    """mmengine's analyzer of model(*inputs) with these formulas.

    Args:
        model: in evaluation mode.
        inputs: on a device where a fast backend of ssm_kernels runs; plain PyTorch would be traced step by step.
    """
    found = FlopAnalyzer(model, inputs if len(inputs) > 1 else inputs[0])
    return found.set_op_handle(**HANDLES).unsupported_ops_warnings(False).uncalled_modules_warnings(False)
