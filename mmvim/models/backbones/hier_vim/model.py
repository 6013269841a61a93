"""Hier-Vim, a hierarchical backbone of bidirectional state-space blocks."""

from collections.abc import Sequence

from mmcv.cnn.bricks.transformer import FFN, PatchEmbed, PatchMerging
from torch import Tensor, nn

from mmvim.arguments import check_divide_output
from mmvim.models.backbones.hier_vim.weights import WEIGHTS
from mmvim.models.base import HierarchicalBackbone, Stage
from mmvim.models.layers.drop_path import drop_path, drop_path_rates
from mmvim.models.layers.vim_mixer import DIRECTIONS, VimMixer
from mmvim.registry import MODELS

# B batch, C channels of a stage, h x w its map, L = h * w tokens


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
        self.drop_path = drop_path(drop_path_rate)
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


@MODELS.register_module()
class HierVim(HierarchicalBackbone):
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
    ARCH = ('embed_dims', 'depths'), ('mlp_ratio', 'd_state', 'd_conv', 'expand', 'dt_rank')
    OUT_TYPES = ('featmap', 'raw', 'avg_featmap')
    CHOICES = dict(directions=DIRECTIONS)
    BLOCKS = 'stages'
    NO_DECAY = ('A_log', 'A_b_log', 'D', 'D_b')
    WEIGHTS = WEIGHTS

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
        super().__init__(locals(), stride=patch_size)
        check_divide_output(divide_output, directions)
        self.patch_size = patch_size
        if directions == 'v2':
            self.divide_output = divide_output
        sizes = {key: self.settings[key] for key in ('d_state', 'd_conv', 'expand', 'dt_rank') if key in self.settings}
        mixer = dict(sizes, directions=directions, divide_output=divide_output, scan_backend=scan_backend)
        self.patch_embed = PatchEmbed(
            in_channels, self.embed_dims, kernel_size=patch_size, stride=patch_size, norm_cfg=dict(type='LN')
        )
        rates = iter(drop_path_rates(drop_path_rate, sum(self.depths)))
        self.stages = nn.ModuleList()
        for i in range(self.out_indices[-1] + 1):
            width = self.embed_dims * 2**i
            mlp_ratio = self.settings.get('mlp_ratio', 4)
            blocks = [HierVimBlock(width, mlp_ratio, next(rates), mixer) for _ in range(self.depths[i])]
            downsample = PatchMerging(width, 2 * width) if i < self.out_indices[-1] else None
            self.stages.append(Stage(blocks, downsample, with_cp))
        if out_type != 'raw':
            self.add_output_norms()
        self.freeze()

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
