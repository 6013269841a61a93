"""The plain vision transformer of DeiT and ViTDet, the baseline that Vim is compared with."""

from collections.abc import Sequence

from torch import Tensor, nn

from mmvim.arguments import as_indices, check_numbers
from mmvim.models.backbones.vit.weights import WEIGHTS
from mmvim.models.base import PlainBackbone, run_block
from mmvim.models.layers.drop_path import drop_path, drop_path_rates
from mmvim.models.layers.transformer import ATTENTIONS, Mlp, SelfAttention
from mmvim.models.layers.windows import from_windows, to_windows
from mmvim.registry import MODELS

# B batch, L tokens with the class token, D width, h x w grid of patches, K windows in a map


class TransformerBlock(nn.Module):
    """Pre-norm residual block of attention and an MLP; attention over all tokens, or in windows of the map.

    Args:
        embed_dims: width D.
        num_heads: heads of the attention.
        mlp_ratio: width of the MLP over D.
        window_size: side of the windows, patches; 0 for attention over all tokens.
        attention: see ``SelfAttention``.
        drop_path_rate: stochastic depth.
        norm_eps: epsilon of the norms.
    """

    def __init__(
        self,
        embed_dims: int,
        num_heads: int,
        mlp_ratio: float,
        window_size: int,
        attention: str,
        drop_path_rate: float,
        norm_eps: float,
    ) -> None:
        super().__init__()
        self.window_size = window_size
        self.norm1 = nn.LayerNorm(embed_dims, eps=norm_eps)
        self.attn = SelfAttention(embed_dims, num_heads, attention)
        self.norm2 = nn.LayerNorm(embed_dims, eps=norm_eps)
        self.mlp = Mlp(embed_dims, int(embed_dims * mlp_ratio))
        self.drop_path = drop_path(drop_path_rate)

    def init_weights(self) -> None:
        """Initialise all parameters."""
        self.attn.init_weights()
        self.mlp.init_weights()
        for norm in (self.norm1, self.norm2):
            norm.reset_parameters()

    def forward(self, x: Tensor, grid: tuple[int, int]) -> Tensor:
        """Tokens (B, L, D) of a grid (h, w) -> tokens (B, L, D)."""
        x = x + self.drop_path(self._attend(self.norm1(x), grid))
        return x + self.drop_path(self.mlp(self.norm2(x)))

    def _attend(self, x: Tensor, grid: tuple[int, int]) -> Tensor:
        if not self.window_size:
            return self.attn(x)
        window = (self.window_size, self.window_size)
        windows = to_windows(x.transpose(1, 2).unflatten(2, grid), window, grid)
        return from_windows(self.attn(windows), window, x.shape[0], grid).flatten(2).transpose(1, 2)


@MODELS.register_module()
class VisionTransformer(PlainBackbone):
    """Plain vision transformer: DeiT (arXiv 2012.12877), and with windows ViTDet's backbone (arXiv 2203.16527, sec. 3).

    The state dictionary has timm's names, which published DeiT files have too. They load as they are by
    ``init_cfg=dict(type='Pretrained', checkpoint=...)``, as do files with the names of detectron2's ViTDet and of
    MMPretrain: what this model has no use for is dropped, and the position table is interpolated to the grid of
    ``img_size``. Images of any size work; the positions are interpolated to theirs at run time. There are no relative
    positions.

    Args:
        arch: a name in ``arch_zoo`` ('deit-tiny', 'deit-small', 'deit-base', or their short forms), or a dict with
            'embed_dims', 'depth', 'num_heads' and optionally 'mlp_ratio'.
        img_size: size for which positions are stored, pixels; an int or (height, width).
        patch_size: side of a patch, pixels.
        in_channels: channels of the image.
        out_indices: blocks whose output is returned, counted from 0; negative ones count from the end. Blocks behind
            the last one wanted are not built.
        out_type: what is returned for each of them. 'cls_token' (B, D); 'avg_featmap' (B, D), mean over patches;
            'featmap' (B, D, h, w); 'raw' (B, L, D), all tokens with the class token first.
        with_cls_token: whether there is a class token. ViTDet has none.
        window_size: side of the windows of blocks with local attention, patches; 0 for global attention everywhere.
            Windows tile the normalised map, which is padded with zeros on the right and at the bottom; the padding
            takes part, as in ViTDet.
        global_attn_indexes: blocks with global attention among those with windows; negative ones count from the end.
        attention: 'sdpa', PyTorch's scaled_dot_product_attention; 'materialized', with the matrix of weights in
            memory.
        final_norm: pass the last block's output through ``norm``. None means not for 'featmap' only.
        drop_rate: dropout after the positions were added.
        drop_path_rate: stochastic depth, from 0 in the first block to this rate in the last one.
        norm_eps: epsilon of the norms.
        frozen_stages: 0 freezes the patch embedding, positions and class token, i the first i blocks as well;
            -1 nothing.
        with_cp: gradient checkpointing, one checkpoint a block.
        interpolate_mode: interpolation of positions.
        init_cfg: initialisation of mmengine.

    Raises:
        ValueError: if an argument has no legal value; the message gives the legal ones.
    """

    arch_zoo = {
        **dict.fromkeys(('deit-ti', 'deit-tiny'), dict(embed_dims=192, depth=12, num_heads=3)),
        **dict.fromkeys(('deit-s', 'deit-small'), dict(embed_dims=384, depth=12, num_heads=6)),
        **dict.fromkeys(('deit-b', 'deit-base'), dict(embed_dims=768, depth=12, num_heads=12)),
    }
    ARCH = ('embed_dims', 'depth', 'num_heads'), ('mlp_ratio',)
    OUT_TYPES = ('cls_token', 'avg_featmap', 'featmap', 'raw')
    CHOICES = dict(attention=ATTENTIONS)
    WEIGHTS = WEIGHTS

    def __init__(
        self,
        arch: str | dict = 'deit-tiny',
        img_size: int | Sequence[int] = 224,
        patch_size: int = 16,
        in_channels: int = 3,
        out_indices: int | Sequence[int] = -1,
        out_type: str = 'cls_token',
        with_cls_token: bool = True,
        window_size: int = 0,
        global_attn_indexes: Sequence[int] = (),
        attention: str = 'sdpa',
        final_norm: bool | None = None,
        drop_rate: float = 0.0,
        drop_path_rate: float = 0.0,
        norm_eps: float = 1e-6,
        frozen_stages: int = -1,
        with_cp: bool = False,
        interpolate_mode: str = 'bicubic',
        init_cfg: dict | None = None,
    ) -> None:
        super().__init__(locals(), cls_layout='head' if with_cls_token else None)
        if out_type == 'cls_token' and not with_cls_token:
            raise ValueError(
                "out_type='cls_token' needs a class token: set with_cls_token=True, or out_type to one of "
                f'{tuple(t for t in self.OUT_TYPES if t != "cls_token")}'
            )
        if window_size and with_cls_token:
            raise ValueError('a class token belongs to no window: set with_cls_token=False, or window_size=0')
        self.with_cls_token = with_cls_token
        self.window_size = window_size
        self.num_heads = self.settings['num_heads']
        self.norm_eps = norm_eps
        self.global_attn_indexes = self._global_blocks(global_attn_indexes)

        self.add_embeddings(in_channels, img_size, patch_size, patch_size, drop_rate)
        rates = drop_path_rates(drop_path_rate, self.depth)
        self.blocks = nn.ModuleList(
            TransformerBlock(
                self.embed_dims,
                self.num_heads,
                self.settings.get('mlp_ratio', 4),
                0 if i in self.global_attn_indexes else window_size,
                attention,
                rates[i],
                norm_eps,
            )
            for i in range(self.out_indices[-1] + 1)
        )
        self.norm = nn.LayerNorm(self.embed_dims, eps=norm_eps) if self.final_norm else nn.Identity()
        self.freeze()

    def _arch_settings(self, arch: str | dict) -> dict:
        settings = super()._arch_settings(arch)
        depth, heads, width = (settings[key] for key in ('depth', 'num_heads', 'embed_dims'))
        check_numbers(**{'depth of arch': depth, 'num_heads of arch': heads})
        if width % heads:
            raise ValueError(f'num_heads of arch must divide embed_dims, got {heads} and {width}')
        return settings

    def _global_blocks(self, indices: int | Sequence[int]) -> tuple[int, ...]:
        blocks = tuple(i + self.depth if i < 0 else i for i in as_indices('global_attn_indexes', indices))
        if any(not 0 <= i < self.depth for i in blocks):
            raise ValueError(f'global_attn_indexes must be within 0 to {self.depth - 1}, got {indices}')
        if blocks and not self.window_size:
            raise ValueError(
                f'global_attn_indexes={blocks} is for blocks among windows: set window_size, or global_attn_indexes=()'
            )
        return blocks

    def init_weights(self) -> None:
        """Initialise all parameters, then load what ``init_cfg`` names."""
        if not self.is_init:
            self.init_embeddings()
            for block in self.blocks:
                block.init_weights()
            if self.final_norm:
                self.norm.reset_parameters()
        super().init_weights()

    def forward(self, x: Tensor) -> tuple[Tensor, ...]:
        """Image (B, C, H, W) -> one output per entry of out_indices, see ``out_type``."""
        x, grid = self.embed(x)
        outputs = []
        for i, block in enumerate(self.blocks):
            x = run_block(block, self.with_cp, x, grid)
            if i in self.out_indices:
                outputs.append(self.read_out(self.norm(x) if i == self.depth - 1 else x, grid))
        return tuple(outputs)
