"""The token mixer of Vim: gated selective scans over the tokens in one or both directions."""

import math

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from mmvim.arguments import check_choice
from mmvim.models.layers.precision import at_least_float32
from ssm_kernels import DirectionWeights, bidirectional_selective_scan, causal_conv1d, load_backends, mamba_inner

# B batch, L tokens, D width, E = expand * D inner width, N state size, R rank of delta

DIRECTIONS = ('v2', 'v1', 'none')


class VimMixer(nn.Module):
    """Bidirectional Mamba mixer of Vim (arXiv 2401.09417, alg. 1), with the parameter names of its checkpoints.

    Args:
        embed_dims: width D.
        d_state: state size N.
        d_conv: width of the depthwise convolution.
        expand: E / D.
        dt_rank: rank R of delta; ceil(D / 16) if None.
        directions: 'v2', both directions with parameters of their own; 'v1', both directions, only A separate;
            'none', one direction.
        divide_output: halve the sum of the two directions; 'v2' only.
        layer_scale_init: start value of a scale per channel on the result; no such scale if None.
        dt_min: smallest initial delta.
        dt_max: largest initial delta.
        dt_init_floor: lower clamp of the initial delta.
        scan_backend: backend of ssm_kernels; the fastest that can run if None.
    """

    def __init__(
        self,
        embed_dims: int,
        d_state: int = 16,
        d_conv: int = 4,
        expand: int = 2,
        dt_rank: int | None = None,
        directions: str = 'v2',
        divide_output: bool = True,
        layer_scale_init: float | None = None,
        dt_min: float = 1e-3,
        dt_max: float = 1e-1,
        dt_init_floor: float = 1e-4,
        scan_backend: str | None = None,
    ) -> None:
        super().__init__()
        load_backends(scan_backend)
        check_choice('directions', directions, DIRECTIONS)
        self.directions = directions
        self.scan_backend = scan_backend
        self.d_state = d_state
        self.dt_rank = dt_rank or math.ceil(embed_dims / 16)
        self.scale = 0.5 if divide_output and directions == 'v2' else 1.0
        self.dt_range = (dt_min, dt_max, dt_init_floor)
        inner = expand * embed_dims

        self.in_proj = nn.Linear(embed_dims, 2 * inner, bias=False)
        for suffix in ('', '_b') if directions == 'v2' else ('',):
            self.add_module(f'conv1d{suffix}', nn.Conv1d(inner, inner, d_conv, groups=inner))
            self.add_module(f'x_proj{suffix}', nn.Linear(inner, self.dt_rank + 2 * d_state, bias=False))
            self.add_module(f'dt_proj{suffix}', nn.Linear(self.dt_rank, inner))
            self.register_parameter(f'D{suffix}', nn.Parameter(torch.empty(inner)))
        self.A_log = nn.Parameter(torch.empty(inner, d_state))
        if directions != 'none':
            self.A_b_log = nn.Parameter(torch.empty(inner, d_state))
        self.out_proj = nn.Linear(inner, embed_dims, bias=False)
        self.layer_scale_init = layer_scale_init
        if layer_scale_init is not None:
            self.gamma = nn.Parameter(torch.empty(embed_dims))
        self.init_weights()

    @torch.no_grad()
    def init_weights(self, depth: int = 1) -> None:
        """Initialise as the Vim authors do; in a network of ``depth`` blocks out_proj is divided by sqrt(depth)."""
        dt_min, dt_max, floor = self.dt_range
        for name, module in self.named_children():
            module.reset_parameters()
            if name.startswith('dt_proj'):
                nn.init.uniform_(module.weight, -(self.dt_rank**-0.5), self.dt_rank**-0.5)
                dt = torch.empty_like(module.bias).uniform_(math.log(dt_min), math.log(dt_max)).exp_().clamp_(min=floor)
                # The inverse of softplus, so that softplus(bias) is dt.
                module.bias.copy_(dt + torch.log(-torch.expm1(-dt)))
        self.out_proj.weight.div_(math.sqrt(depth))
        for name, parameter in self.named_parameters(recurse=False):
            if name.endswith('_log'):
                parameter.copy_(torch.arange(1, self.d_state + 1).log().expand_as(parameter))
            else:
                parameter.fill_(self.layer_scale_init if name == 'gamma' else 1.0)

    def forward(self, x: Tensor, reverse: bool = False) -> Tensor:
        """Mix tokens.

        Args:
            x: tokens (B, L, D).
            reverse: scan from the last token to the first; for directions='none' only.

        Returns:
            Tokens (B, L, D).
        """
        x, z = self.in_proj(x).chunk(2, dim=-1)
        if self.directions == 'v1':
            y = self._scan_shared(x, z)
        else:
            weights = [self._direction('', self.A_log)]
            if self.directions == 'v2':
                weights.append(self._direction('_b', self.A_b_log))
            y = mamba_inner(x, z, weights, scale=self.scale, reverse=reverse, backend=self.scan_backend)
        y = self.out_proj(y)
        return y if self.layer_scale_init is None else y * self.gamma

    def _direction(self, suffix: str, A_log: Tensor) -> DirectionWeights:
        conv, x_proj, dt_proj, D = (getattr(self, name + suffix) for name in ('conv1d', 'x_proj', 'dt_proj', 'D'))
        A = -at_least_float32(A_log).exp()
        return DirectionWeights(conv.weight.squeeze(1), conv.bias, x_proj.weight, dt_proj.weight, A, D, dt_proj.bias)

    def _scan_shared(self, x: Tensor, z: Tensor) -> Tensor:
        """Both directions with one convolution and one (dt, B, C), which the second one reads from the end."""
        u = causal_conv1d(x, self.conv1d.weight.squeeze(1), self.conv1d.bias, backend=self.scan_backend)
        dt, B, C = self.x_proj(u).split((self.dt_rank, self.d_state, self.d_state), dim=-1)
        dt = F.linear(dt, self.dt_proj.weight)
        A = torch.stack([-at_least_float32(A_log).exp() for A_log in (self.A_log, self.A_b_log)])
        D, bias = at_least_float32(self.D), at_least_float32(self.dt_proj.bias)
        u, dt, B, C, D, bias = (t.expand(2, *t.shape) for t in (u, dt, B, C, D, bias))
        return bidirectional_selective_scan(u, dt, A, B, C, D, z, bias, dt_softplus=True, backend=self.scan_backend)
