"""Vim-Ti and DeiT-Ti in plain PyTorch on ssm_kernels, for benchmarks on machines without OpenMMLab and timm.

Parameters have the names of mmvim's VisionMamba and of timm's VisionTransformer; tests load their state into these and
compare. Neither has class tokens here. Vim's mixer takes one of three pipelines: the package's own, eager PyTorch, or
that of the published code, with tokens flipped for the second direction and mamba_ssm's CUDA scan. The norm is eager
PyTorch's in the latter two.
"""

# B batch, L tokens, D width, E = 2 D inner width, N state size, R rank of delta

from __future__ import annotations

import importlib
from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.nn.attention import SDPBackend, sdpa_kernel

from ssm_kernels import DirectionWeights, add_rms_norm, mamba_inner


def inner_ours(x: Tensor, z: Tensor, weights: list[DirectionWeights]) -> Tensor:
    return mamba_inner(x, z, weights, scale=0.5)


def inner_eager(x: Tensor, z: Tensor, weights: list[DirectionWeights]) -> Tensor:
    return mamba_inner(x, z, weights, scale=0.5, backend='torch')


def peer(package: str, name: str) -> Callable | None:
    """A function of a package that may be missing or broken."""
    try:
        return getattr(importlib.import_module(package), name)
    except Exception:  # its compiled parts fail in many ways
        return None


def inner_mamba_ssm(x: Tensor, z: Tensor, weights: list[DirectionWeights]) -> Tensor:
    """Channels first; the second direction is the first on flipped tokens."""
    scan = peer('mamba_ssm.ops.selective_scan_interface', 'selective_scan_fn')
    if scan is None:
        raise RuntimeError('mamba_ssm has no selective_scan_fn here')
    y = None
    for k, w in enumerate(weights):
        u, gate = (t.transpose(1, 2).flip(2) if k else t.transpose(1, 2) for t in (x, z))
        u = conv_channels_first(u.contiguous(), w.conv_weight, w.conv_bias)
        n, rank = w.A.shape[1], w.dt_proj.shape[1]
        dt, B, C = F.linear(u.transpose(1, 2), w.x_proj).split((rank, n, n), dim=-1)
        dt = F.linear(dt, w.dt_proj).transpose(1, 2)
        B, C = (t.transpose(1, 2).contiguous() for t in (B, C))
        out = scan(
            u, dt.contiguous(), w.A, B, C, w.D.float(), gate.contiguous(), w.dt_bias.float(), delta_softplus=True
        )
        y = out.flip(2) + y if k else out
    return (0.5 * y).transpose(1, 2).to(x.dtype)


def conv_channels_first(x: Tensor, weight: Tensor, bias: Tensor) -> Tensor:
    """Causal convolution and SiLU of (B, E, L), by the causal_conv1d package if it is there, as in published code."""
    conv = peer('causal_conv1d', 'causal_conv1d_fn')
    if conv is not None and x.is_cuda:
        return conv(x, weight, bias=bias, activation='silu')
    return F.silu(
        F.conv1d(x, weight.unsqueeze(1), bias, padding=weight.shape[1] - 1, groups=len(weight))[..., : x.shape[2]]
    )


INNER = {'ours': inner_ours, 'eager': inner_eager, 'mamba_ssm': inner_mamba_ssm}


class VimMixer(nn.Module):
    def __init__(self, width: int, pipeline: str, n: int = 16) -> None:
        super().__init__()
        self.inner = INNER[pipeline]
        E, R = 2 * width, -(-width // 16)
        self.in_proj = nn.Linear(width, 2 * E, bias=False)
        for suffix in ('', '_b'):
            self.add_module(f'conv1d{suffix}', nn.Conv1d(E, E, 4, groups=E))
            self.add_module(f'x_proj{suffix}', nn.Linear(E, R + 2 * n, bias=False))
            self.add_module(f'dt_proj{suffix}', nn.Linear(R, E))
            self.register_parameter(f'D{suffix}', nn.Parameter(torch.ones(E)))
        for name in ('A_log', 'A_b_log'):
            self.register_parameter(name, nn.Parameter(torch.arange(1.0, n + 1).log().repeat(E, 1)))
        for layer in (self.dt_proj, self.dt_proj_b):
            nn.init.uniform_(layer.bias, -6.9, -2.3)  # steps of about 0.001 to 0.1, as at the start of training
        self.out_proj = nn.Linear(E, width, bias=False)

    def weights(self, suffix: str, A_log: Tensor) -> DirectionWeights:
        conv, x_proj, dt_proj, D = (getattr(self, name + suffix) for name in ('conv1d', 'x_proj', 'dt_proj', 'D'))
        A = -A_log.float().exp()
        return DirectionWeights(conv.weight.squeeze(1), conv.bias, x_proj.weight, dt_proj.weight, A, D, dt_proj.bias)

    def forward(self, x: Tensor) -> Tensor:
        x, z = self.in_proj(x).chunk(2, dim=-1)
        return self.out_proj(self.inner(x, z, [self.weights('', self.A_log), self.weights('_b', self.A_b_log)]))


class VimBlock(nn.Module):
    def __init__(self, width: int, pipeline: str = 'ours') -> None:
        super().__init__()
        self.norm = nn.RMSNorm(width, eps=1e-5)
        self.mixer = VimMixer(width, pipeline)
        self.norm_backend = None if pipeline == 'ours' else 'torch'

    def forward(self, hidden: Tensor, residual: Tensor | None = None) -> tuple[Tensor, Tensor]:
        hidden, residual = add_rms_norm(hidden, residual, self.norm.weight, eps=1e-5, backend=self.norm_backend)
        return self.mixer(hidden), residual


class DeiTBlock(nn.Module):
    """``attention``: 'flash' forces FlashAttention, 'sdpa' lets PyTorch choose, 'materialised' stores L x L scores."""

    def __init__(self, width: int, attention: str = 'sdpa', heads: int = 3) -> None:
        super().__init__()
        self.attention, self.heads = attention, heads
        self.norm1, self.norm2 = nn.LayerNorm(width, eps=1e-6), nn.LayerNorm(width, eps=1e-6)
        self.attn = nn.ModuleDict({'qkv': nn.Linear(width, 3 * width), 'proj': nn.Linear(width, width)})
        self.mlp = nn.ModuleDict({'fc1': nn.Linear(width, 4 * width), 'fc2': nn.Linear(4 * width, width)})

    def attend(self, x: Tensor) -> Tensor:
        q, k, v = self.attn['qkv'](x).unflatten(2, (3, self.heads, -1)).permute(2, 0, 3, 1, 4)
        if self.attention == 'materialised':
            y = (q * q.shape[-1] ** -0.5 @ k.transpose(2, 3)).softmax(-1) @ v
        elif self.attention == 'flash':
            with sdpa_kernel(SDPBackend.FLASH_ATTENTION):
                y = F.scaled_dot_product_attention(q, k, v)
        else:
            y = F.scaled_dot_product_attention(q, k, v)
        return self.attn['proj'](y.transpose(1, 2).flatten(2))

    def forward(self, x: Tensor) -> Tensor:
        x = x + self.attend(self.norm1(x))
        return x + self.mlp['fc2'](F.gelu(self.mlp['fc1'](self.norm2(x))))


class _Backbone(nn.Module):
    def __init__(self, size: int, width: int) -> None:
        super().__init__()
        self.patch_embed = nn.ModuleDict({'proj': nn.Conv2d(3, width, 16, 16)})
        self.pos_embed = nn.Parameter(torch.randn(1, (size // 16) ** 2, width) * 0.02)

    def embed(self, image: Tensor) -> Tensor:
        return self.patch_embed['proj'](image).flatten(2).transpose(1, 2) + self.pos_embed


class Vim(_Backbone):
    """Vim-Ti without class tokens: image (B, 3, H, W) -> normalised tokens (B, L, D)."""

    def __init__(self, size: int, pipeline: str = 'ours', width: int = 192, depth: int = 24) -> None:
        super().__init__(size, width)
        self.layers = nn.ModuleList(VimBlock(width, pipeline) for _ in range(depth))
        self.norm_f = nn.RMSNorm(width, eps=1e-5)

    def forward(self, image: Tensor) -> Tensor:
        hidden, residual = self.embed(image), None
        for layer in self.layers:
            hidden, residual = layer(hidden, residual)
        return self.norm_f((residual + hidden).to(self.norm_f.weight.dtype))


class DeiT(_Backbone):
    """DeiT-Ti without class token: image (B, 3, H, W) -> normalised tokens (B, L, D)."""

    def __init__(self, size: int, attention: str = 'sdpa', width: int = 192, depth: int = 12) -> None:
        super().__init__(size, width)
        self.blocks = nn.ModuleList(DeiTBlock(width, attention) for _ in range(depth))
        self.norm = nn.LayerNorm(width, eps=1e-6)

    def forward(self, image: Tensor) -> Tensor:
        x = self.embed(image)
        for block in self.blocks:
            x = block(x)
        return self.norm(x)


def narrow(model: nn.Module, dtype: torch.dtype) -> nn.Module:
    """The model with its parameters in a dtype; those of the scan and the residual stream stay in float32."""
    wide = ('A_log', 'A_b_log', 'D', 'D_b')
    for name, parameter in model.named_parameters():
        if name.rpartition('.')[2] not in wide:
            parameter.data = parameter.data.to(dtype)
    return model
