"""MambaVision's own token mixer: a selective scan beside a branch without one."""

import math

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from mmvim.arguments import check_choice
from mmvim.models.layers.precision import at_least_float32
from mmvim.models.layers.transformer import init_linear
from ssm_kernels import DirectionWeights, causal_conv1d, load_backends, mamba_inner, same_conv1d

# B batch, L tokens, D width, E = D / 2 width of a branch, N state size, R rank of delta

CONVS = {'same': same_conv1d, 'causal': causal_conv1d}
MERGES = ('concat', 'gate')
DT_INITS = ('published', 'mamba')
PLACES = ('early', 'middle', 'last', 'none', 'all')


def attention_places(depth: int, attention: str | int) -> tuple[bool, ...]:
    """Which blocks of a level of this depth are attention, see ``MambaVision``'s argument."""
    if isinstance(attention, int):
        return tuple((i + 1) % attention == 0 for i in range(depth))
    count = {'none': 0, 'all': depth}.get(attention, depth // 2)
    start = {'middle': (depth - count) // 2, 'last': depth - count}.get(attention, 0)
    return tuple(start <= i < start + count for i in range(depth))


class MambaVisionMixer(nn.Module):
    """Mixer of MambaVision (arXiv 2407.08083, section 3), with the parameter names of its checkpoints.

    Half of the channels pass a convolution, SiLU and the scan, the other half a convolution and SiLU; the result of
    both is projected. The options other than the defaults are the steps from Mamba's own mixer to this one.

    Args:
        embed_dims: width D, even.
        d_state: state size N.
        d_conv: width of the depthwise convolutions.
        dt_rank: rank R of delta; ceil(D / 16) if None.
        conv: 'same', regular convolutions, or 'causal' ones.
        symmetric: whether the branch without a scan has a convolution too.
        merge: 'concat' of the branches, or 'gate', the scan's result times the other branch.
        dt_init: 'published', delta's projection like every other linear layer: normal weights, zero bias; or 'mamba',
            a bias by which the first deltas lie between 1e-3 and 1e-1.
        scan_backend: backend of ssm_kernels; the fastest that can run if None.
    """

    def __init__(
        self,
        embed_dims: int,
        d_state: int = 8,
        d_conv: int = 3,
        dt_rank: int | None = None,
        conv: str = 'same',
        symmetric: bool = True,
        merge: str = 'concat',
        dt_init: str = 'published',
        scan_backend: str | None = None,
    ) -> None:
        super().__init__()
        load_backends(scan_backend)
        check_choice('conv', conv, CONVS)
        check_choice('merge', merge, MERGES)
        check_choice('dt_init', dt_init, DT_INITS)
        self.d_state = d_state
        self.dt_rank = dt_rank or math.ceil(embed_dims / 16)
        self.conv = conv
        self.symmetric = symmetric
        self.merge = merge
        self.dt_init = dt_init
        self.scan_backend = scan_backend
        inner = embed_dims // 2

        self.in_proj = nn.Linear(embed_dims, 2 * inner, bias=False)
        self.conv1d_x = nn.Conv1d(inner, inner, d_conv, groups=inner, bias=False)
        if symmetric:
            self.conv1d_z = nn.Conv1d(inner, inner, d_conv, groups=inner, bias=False)
        self.x_proj = nn.Linear(inner, self.dt_rank + 2 * d_state, bias=False)
        self.dt_proj = nn.Linear(self.dt_rank, inner)
        self.A_log = nn.Parameter(torch.empty(inner, d_state))
        self.D = nn.Parameter(torch.empty(inner))
        self.out_proj = nn.Linear(2 * inner if merge == 'concat' else inner, embed_dims, bias=False)
        self.init_weights()

    @torch.no_grad()
    def init_weights(self) -> None:
        """Initialise as the published models were, see ``dt_init``."""
        for module in self.children():
            module.reset_parameters()
            if isinstance(module, nn.Linear):
                init_linear(module)
        if self.dt_init == 'mamba':
            nn.init.uniform_(self.dt_proj.weight, -(self.dt_rank**-0.5), self.dt_rank**-0.5)
            dt = torch.empty_like(self.dt_proj.bias).uniform_(math.log(1e-3), math.log(1e-1)).exp_()
            # The bias counts twice, hence half of the inverse of softplus.
            self.dt_proj.bias.copy_((dt + torch.log(-torch.expm1(-dt))) / 2)
        self.A_log.copy_(torch.arange(1, self.d_state + 1).log().expand_as(self.A_log))
        self.D.fill_(1.0)

    def forward(self, x: Tensor) -> Tensor:
        """Tokens (B, L, D) -> tokens (B, L, D)."""
        x, z = self.in_proj(x).chunk(2, dim=-1)
        weights = DirectionWeights(
            conv_weight=self.conv1d_x.weight.squeeze(1),
            conv_bias=None,
            x_proj=self.x_proj.weight,
            dt_proj=self.dt_proj.weight,
            A=-at_least_float32(self.A_log).exp(),
            D=self.D,
            # In the published models the projection adds its bias and the scan adds it again.
            dt_bias=2 * self.dt_proj.bias,
        )
        y = mamba_inner(x, None, [weights], padding=self.conv, backend=self.scan_backend)
        if self.symmetric:
            z = CONVS[self.conv](z, self.conv1d_z.weight.squeeze(1), backend=self.scan_backend)
        else:
            z = F.silu(z)
        return self.out_proj(torch.cat((y, z), dim=-1) if self.merge == 'concat' else y * z)
