"""Hier-Vim, a hierarchical backbone of bidirectional state-space blocks."""

from collections.abc import Sequence

import torch
from mmcv.cnn.bricks import DropPath
from mmcv.cnn.bricks.transformer import FFN, PatchEmbed, PatchMerging
from mmengine.model import BaseModule
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from mmvim.arguments import (
    as_indices,
    check_arch,
    check_backend,
    check_choice,
    check_divide_output,
    check_flags,
    check_frozen_stages,
    check_init_cfg,
    check_numbers,
    check_rates,
    four_numbers,
)
from mmvim.checkpoints import load_hier_vim
from mmvim.models.layers.norm import LayerNorm2d
from mmvim.models.layers.vim_mixer import DIRECTIONS, VimMixer
from mmvim.registry import MODELS

# B batch, C channels of a stage, h x w its map, L = h * w tokens

NUM_STAGES = 4


class HierVimBlock(nn.Module):
    """Pre-norm residual block: the bidirectional mixer over all tokens of the map, then an MLP.

    Args:
        embed_dims: channels C.
        mlp_ratio: width of the MLP over C.
        drop_path_rate: stochastic depth of both branches.
        mixer: arguments of VimMixer.
    """

    def __init__(self, embed_dims: int, mlp_ratio: float, drop_path_rate: float, mixer: dict) -> None:
        super().__init__()
        self.norm1 = nn.LayerNorm(embed_dims)
        self.mixer = VimMixer(embed_dims, **mixer)
        self.drop_path = DropPath(drop_path_rate) if drop_path_rate > 0 else nn.Identity()
        self.norm2 = nn.LayerNorm(embed_dims)
        self.ffn = FFN(
            embed_dims,
            int(embed_dims * mlp_ratio),
            act_cfg=dict(type='GELU'),
            dropout_layer=dict(type='DropPath', drop_prob=drop_path_rate) if drop_path_rate > 0 else None,
        )

    def forward(self, x: Tensor) -> Tensor:
        """Tokens (B, L, C) -> tokens (B, L, C)."""
        x = x + self.drop_path(self.mixer(self.norm1(x)))
        return self.ffn(self.norm2(x), identity=x)


class Stage(nn.Module):
    """Blocks of one resolution, and what leads to the next.

    Args:
        blocks: the blocks.
        downsample: what leads to the next stage; None behind the last that is built.
        with_cp: gradient checkpointing, one checkpoint a block.
    """

    def __init__(self, blocks: Sequence[nn.Module], downsample: nn.Module | None, with_cp: bool) -> None:
        super().__init__()
        self.blocks = nn.ModuleList(blocks)
        if downsample is not None:
            self.downsample = downsample
        self.with_cp = with_cp

    def forward(self, x: Tensor) -> Tensor:
        """Tokens (B, L, C) -> tokens (B, L, C), not down-sampled."""
        for block in self.blocks:
            if self.with_cp and torch.is_grad_enabled() and x.requires_grad:
                x = checkpoint(block, x, use_reentrant=False)
            else:
                x = block(x)
        return x


@MODELS.register_module()
class HierVim(BaseModule):
    """Hier-Vim: Swin's layout with Vim's bidirectional scan in place of shifted-window attention (arXiv 2401.09417).

    Patches of 4x4 pixels, four stages of blocks, and between them 2x2 neighbours merged into one token of twice the
    channels. Every scan goes over all tokens of its stage in row-major order, so images of any size work; the sides of
    each map are those of the one before it, halved and rounded up. The paper describes the model in its appendix and
    there is no public code: what the description leaves open is Swin's (LayerNorm, no positions beside the order of
    the scan, initialisation) or Vim's (the mixer and its initialisation). A classifier with 1000 classes has 32.4, 54.6
    and 96.0 million parameters, where the paper has about 30, 50 and 89.

    Args:
        arch: a name in ``arch_zoo`` ('tiny', 'small', 'base', or their short forms), or a dict with 'embed_dims'
            (channels of stage 0; every stage has twice as many as the one before it) and 'depths' (four numbers) and
            optionally 'mlp_ratio', 'd_state', 'd_conv', 'expand' and 'dt_rank'.
        in_channels: channels of the image.
        patch_size: side of a patch, pixels.
        out_indices: stages whose output is returned, counted from 0; negative ones count from the end. None means all
            four, or the last for 'avg_featmap'. Stages behind the last one wanted are not built.
        out_type: 'featmap', maps (B, C, h, w) that pass a LayerNorm over the channels, ``outnorm0`` to ``outnorm3``;
            'raw', the maps without it; 'avg_featmap', of the last stage only, ``outnorm3`` and the mean over the
            map, (B, C), for a classifier.
        directions: 'v2', both directions with parameters of their own; 'v1', both directions, only A separate; 'none',
            forward only.
        divide_output: halve the sum of the two directions of 'v2'; not to is for 'v2' only.
        drop_path_rate: stochastic depth, from 0 in the first block to this rate in the last one of all stages.
        frozen_stages: 0 freezes the patch embedding, i the first i stages as well; -1 nothing.
        with_cp: gradient checkpointing, one checkpoint a block.
        scan_backend: backend of all operators of ssm_kernels in the model; each takes the fastest that can run if None.
        init_cfg: initialisation of mmengine.

    Raises:
        ValueError: if an argument has no legal value; the message gives the legal ones.
    """

    arch_zoo = {
        **dict.fromkeys(('t', 'tiny'), dict(embed_dims=96, depths=(2, 2, 5, 2))),
        **dict.fromkeys(('s', 'small'), dict(embed_dims=96, depths=(2, 2, 15, 2))),
        **dict.fromkeys(('b', 'base'), dict(embed_dims=128, depths=(2, 2, 15, 2))),
    }
    OUT_TYPES = ('featmap', 'raw', 'avg_featmap')

    def __init__(
        self,
        arch: str | dict = 'tiny',
        in_channels: int = 3,
        patch_size: int = 4,
        out_indices: int | Sequence[int] | None = None,
        out_type: str = 'featmap',
        directions: str = 'v2',
        divide_output: bool = True,
        drop_path_rate: float = 0.0,
        frozen_stages: int = -1,
        with_cp: bool = False,
        scan_backend: str | None = None,
        init_cfg: dict | None = None,
    ) -> None:
        super().__init__(init_cfg)
        check_init_cfg(init_cfg)
        settings = self._arch_settings(arch)
        self.embed_dims = settings.pop('embed_dims')
        self.depths = tuple(settings.pop('depths'))
        mlp_ratio = settings.pop('mlp_ratio', 4)
        check_choice('out_type', out_type, self.OUT_TYPES)
        check_choice('directions', directions, DIRECTIONS)
        check_numbers(patch_size=patch_size, in_channels=in_channels)
        check_rates(drop_path_rate=drop_path_rate)
        check_divide_output(divide_output, directions)
        check_flags(with_cp=with_cp)
        check_frozen_stages(frozen_stages, NUM_STAGES)
        check_backend(scan_backend)
        self.patch_size = patch_size
        self.out_type = out_type
        self.out_indices = self._absolute_indices(out_indices)
        self.frozen_stages = frozen_stages

        self.patch_embed = PatchEmbed(
            in_channels, self.embed_dims, kernel_size=patch_size, stride=patch_size, norm_cfg=dict(type='LN')
        )
        count = sum(self.depths)
        rates = iter([drop_path_rate * i / (count - 1) for i in range(count)])
        mixer = dict(settings, directions=directions, divide_output=divide_output, scan_backend=scan_backend)
        self.stages = nn.ModuleList()
        for i in range(self.out_indices[-1] + 1):
            width = self.embed_dims * 2**i
            blocks = [HierVimBlock(width, mlp_ratio, next(rates), mixer) for _ in range(self.depths[i])]
            downsample = PatchMerging(width, 2 * width) if i < self.out_indices[-1] else None
            self.stages.append(Stage(blocks, downsample, with_cp))
        if out_type != 'raw':
            for i, channels in zip(self.out_indices, self.out_channels, strict=True):
                self.add_module(f'outnorm{i}', LayerNorm2d(channels, eps=1e-5))
        for module in self._frozen_modules():
            module.requires_grad_(False)
        load_hier_vim(self)

    # ---- arguments

    def _arch_settings(self, arch: str | dict) -> dict:
        if isinstance(arch, str):
            if arch.lower() not in self.arch_zoo:
                raise ValueError(f'arch must be one of {tuple(self.arch_zoo)}, got {arch!r}')
            return dict(self.arch_zoo[arch.lower()])
        required, optional = {'embed_dims', 'depths'}, {'mlp_ratio', 'd_state', 'd_conv', 'expand', 'dt_rank'}
        if not isinstance(arch, dict) or not required <= set(arch) <= required | optional:
            raise ValueError(
                f'arch must be one of {tuple(self.arch_zoo)} or a dict with {sorted(required)} and optionally '
                f'{sorted(optional)}, got {arch!r}'
            )
        check_arch(arch)
        four_numbers('depths of arch', arch['depths'], 'stage')
        return dict(arch)

    def _absolute_indices(self, out_indices: int | Sequence[int] | None) -> tuple[int, ...]:
        last = NUM_STAGES - 1
        if out_indices is None:
            return (last,) if self.out_type == 'avg_featmap' else tuple(range(NUM_STAGES))
        given = as_indices('out_indices', out_indices)
        indices = tuple(i + NUM_STAGES if i < 0 else i for i in given)
        if not indices or list(indices) != sorted(set(indices)) or not 0 <= indices[0] <= indices[-1] <= last:
            raise ValueError(f'out_indices must rise within 0 to {last}, got {out_indices}')
        if self.out_type == 'avg_featmap' and indices != (last,):
            raise ValueError(f"out_type='avg_featmap' is of the last stage: set out_indices=({last},), not {given}")
        return indices

    @property
    def out_channels(self) -> tuple[int, ...]:
        """Channels of each output."""
        return tuple(self.embed_dims * 2**i for i in self.out_indices)

    @property
    def out_strides(self) -> tuple[int, ...]:
        """Stride of each output map, pixels."""
        return tuple(self.patch_size * 2**i for i in self.out_indices)

    # ---- parameters

    def init_weights(self) -> None:
        """Initialise all parameters, then load what ``init_cfg`` names."""
        if not self.is_init:
            # With a bias of zero, padded pixels would stay zero, and every norm would multiply their gradient by 316.
            self.patch_embed.projection.reset_parameters()
            for module in self.modules():
                if isinstance(module, VimMixer):
                    module.init_weights(sum(self.depths))
                elif isinstance(module, FFN | PatchMerging):
                    for linear in module.modules():
                        if isinstance(linear, nn.Linear):
                            nn.init.trunc_normal_(linear.weight, std=0.02)
                            if linear.bias is not None:
                                nn.init.zeros_(linear.bias)
                elif isinstance(module, nn.LayerNorm):
                    module.reset_parameters()
        super().init_weights()

    def no_weight_decay(self) -> set[str]:
        """Names of the parameters, other than biases and norms, to which no weight decay applies."""
        last_parts = ('A_log', 'A_b_log', 'D', 'D_b')
        return {name for name, _ in self.named_parameters() if name.rpartition('.')[2] in last_parts}

    def get_layer_depth(self, param_name: str, prefix: str = '') -> tuple[int, int]:
        """Depth of a parameter for layer-wise learning rates.

        Args:
            param_name: name of the parameter.
            prefix: what stands before this module's names in it.

        Returns:
            The depth, and the number of depths: 0 is the patch embedding, i + 1 block i counted through all stages (a
            stage's down-sampling belongs to its last block), the last the norms of the outputs and all that follows
            the backbone.
        """
        num_depths = sum(self.depths) + 2
        parts = param_name.removeprefix(prefix).split('.') if param_name.startswith(prefix) else ['']
        if parts[0] == 'patch_embed':
            return 0, num_depths
        if parts[0] == 'stages':
            stage = int(parts[1])
            block = int(parts[3]) if parts[2] == 'blocks' else self.depths[stage] - 1
            return sum(self.depths[:stage]) + block + 1, num_depths
        return num_depths - 1, num_depths

    def _frozen_modules(self) -> list[nn.Module]:
        return [self.patch_embed, *self.stages[: self.frozen_stages]] if self.frozen_stages >= 0 else []

    def train(self, mode: bool = True):
        """Set training mode; frozen stages stay in evaluation mode."""
        super().train(mode)
        for module in self._frozen_modules():
            module.eval()
        return self

    # ---- forward

    def forward(self, x: Tensor) -> tuple[Tensor, ...]:
        """Image (B, channels, H, W) -> one output per entry of out_indices, see ``out_type``."""
        x, grid = self.patch_embed(x)
        outputs = []
        for i, stage in enumerate(self.stages):
            x = stage(x)
            if i in self.out_indices:
                outputs.append(self._read_out(x, grid, i))
            if i < len(self.stages) - 1:
                x, grid = stage.downsample(x, grid)
        return tuple(outputs)

    def _read_out(self, x: Tensor, grid: tuple[int, int], stage: int) -> Tensor:
        x = x.transpose(1, 2).unflatten(2, grid)
        if self.out_type != 'raw':
            x = getattr(self, f'outnorm{stage}')(x)
        return x.mean((2, 3)) if self.out_type == 'avg_featmap' else x.contiguous()
