"""The plain vision transformer of DeiT and ViTDet, the baseline that Vim is compared with."""

from collections.abc import Sequence

import torch
from mmcv.cnn.bricks import DropPath
from mmengine.model import BaseModule
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from mmvim.arguments import (
    as_indices,
    check_arch,
    check_choice,
    check_flags,
    check_frozen_stages,
    check_init_cfg,
    check_interpolation,
    check_numbers,
    check_positive,
    check_rates,
    image_sides,
)
from mmvim.checkpoints.deit import load_published_deit
from mmvim.models.layers.patch_embed import PatchEmbed, PositionCache, lecun_normal_, resize_pos_embed
from mmvim.models.layers.shapes import surely_equal
from mmvim.models.layers.transformer import Mlp, SelfAttention
from mmvim.models.layers.windows import from_windows, to_windows
from mmvim.registry import MODELS

# B batch, L tokens with the class token, D width, h x w grid of patches, K windows in a map

ATTENTIONS = ('sdpa', 'materialized')


class Attention(SelfAttention):
    """Multi-head self-attention by PyTorch's fused kernels, or with the matrix of weights in memory.

    Args:
        embed_dims: width D.
        num_heads: heads; they divide D.
        attention: 'sdpa' calls scaled_dot_product_attention; 'materialized' computes the L x L weights of every head,
            as the baseline of the Vim paper does, for comparisons of memory and time.
    """

    def __init__(self, embed_dims: int, num_heads: int, attention: str) -> None:
        super().__init__(embed_dims, num_heads)
        self.attention = attention

    def forward(self, x: Tensor) -> Tensor:
        """Tokens (B, L, D) -> tokens (B, L, D)."""
        if self.attention == 'sdpa':
            return super().forward(x)
        q, k, v = self.qkv(x).unflatten(-1, (3, self.num_heads, -1)).permute(2, 0, 3, 1, 4)
        weights = (q * q.shape[-1] ** -0.5 @ k.transpose(-2, -1)).softmax(dim=-1)
        return self.proj((weights @ v).transpose(1, 2).flatten(2))


class TransformerBlock(nn.Module):
    """Pre-norm residual block of attention and an MLP; attention over all tokens, or in windows of the map.

    Args:
        embed_dims: width D.
        num_heads: heads of the attention.
        mlp_ratio: width of the MLP over D.
        window_size: side of the windows, patches; 0 for attention over all tokens.
        attention: see ``Attention``.
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
        self.attn = Attention(embed_dims, num_heads, attention)
        self.norm2 = nn.LayerNorm(embed_dims, eps=norm_eps)
        self.mlp = Mlp(embed_dims, int(embed_dims * mlp_ratio))
        self.drop_path = DropPath(drop_path_rate) if drop_path_rate > 0 else nn.Identity()

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
class VisionTransformer(BaseModule):
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
    OUT_TYPES = ('cls_token', 'avg_featmap', 'featmap', 'raw')

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
        super().__init__(init_cfg)
        check_init_cfg(init_cfg)
        settings = self._arch_settings(arch)
        self.embed_dims = settings['embed_dims']
        self.depth = settings['depth']
        check_choice('out_type', out_type, self.OUT_TYPES)
        check_choice('attention', attention, ATTENTIONS)
        check_numbers(patch_size=patch_size, in_channels=in_channels)
        check_interpolation(interpolate_mode)
        check_flags(with_cls_token=with_cls_token, with_cp=with_cp)
        if final_norm is not None:
            check_flags(final_norm=final_norm)
        check_positive(norm_eps=norm_eps)
        if out_type == 'cls_token' and not with_cls_token:
            raise ValueError(
                "out_type='cls_token' needs a class token: set with_cls_token=True, or out_type to one of "
                f'{tuple(t for t in self.OUT_TYPES if t != "cls_token")}'
            )
        check_numbers(0, window_size=window_size)
        if window_size and with_cls_token:
            raise ValueError('a class token belongs to no window: set with_cls_token=False, or window_size=0')
        self.global_attn_indexes = self._absolute('global_attn_indexes', global_attn_indexes)
        if self.global_attn_indexes and not window_size:
            raise ValueError(
                f'global_attn_indexes={self.global_attn_indexes} is for blocks among windows: set window_size, or '
                'global_attn_indexes=()'
            )
        check_rates(drop_rate=drop_rate, drop_path_rate=drop_path_rate)
        check_frozen_stages(frozen_stages, self.depth)
        self.out_type = out_type
        self.with_cls_token = with_cls_token
        self.final_norm = out_type != 'featmap' if final_norm is None else final_norm
        self.out_indices = self._absolute('out_indices', out_indices)
        if not self.out_indices or list(self.out_indices) != sorted(set(self.out_indices)):
            raise ValueError(f'out_indices must rise within 0 to {self.depth - 1}, got {out_indices}')
        if self.final_norm and self.out_indices[-1] != self.depth - 1:
            raise ValueError(
                f'final_norm belongs to the last block, {self.depth - 1}, which out_indices {out_indices} leaves out: '
                'add it, or set final_norm=False'
            )
        self.window_size = window_size
        self.frozen_stages = frozen_stages
        self.with_cp = with_cp
        self.interpolate_mode = interpolate_mode

        self.patch_embed = PatchEmbed(in_channels, self.embed_dims, patch_size, patch_size)
        self.grid = self.patch_embed.grid_size(*image_sides(img_size))
        if with_cls_token:
            self.cls_token = nn.Parameter(torch.zeros(1, 1, self.embed_dims))
        num_tokens = self.grid[0] * self.grid[1] + with_cls_token
        self.pos_embed = nn.Parameter(torch.zeros(1, num_tokens, self.embed_dims))
        self.position_cache = PositionCache()
        self.drop_after_pos = nn.Dropout(drop_rate)
        rates = [drop_path_rate * i / max(self.depth - 1, 1) for i in range(self.depth)]
        self.blocks = nn.ModuleList(
            TransformerBlock(
                self.embed_dims,
                settings['num_heads'],
                settings.get('mlp_ratio', 4),
                0 if i in self.global_attn_indexes else window_size,
                attention,
                rates[i],
                norm_eps,
            )
            for i in range(self.out_indices[-1] + 1)
        )
        self.norm = nn.LayerNorm(self.embed_dims, eps=norm_eps) if self.final_norm else nn.Identity()
        for module in self._frozen_modules():
            module.requires_grad_(False)
        if frozen_stages >= 0:
            for name in self._embeddings():
                getattr(self, name).requires_grad_(False)
        load_published_deit(self)

    # ---- arguments

    def _arch_settings(self, arch: str | dict) -> dict:
        if isinstance(arch, str):
            if arch.lower() not in self.arch_zoo:
                raise ValueError(f'arch must be one of {tuple(self.arch_zoo)}, got {arch!r}')
            return self.arch_zoo[arch.lower()]
        required, optional = {'embed_dims', 'depth', 'num_heads'}, {'mlp_ratio'}
        if not isinstance(arch, dict) or not required <= set(arch) <= required | optional:
            raise ValueError(
                f'arch must be one of {tuple(self.arch_zoo)} or a dict with {sorted(required)} and optionally '
                f'{sorted(optional)}, got {arch!r}'
            )
        check_arch(arch)
        check_numbers(**{'depth of arch': arch['depth'], 'num_heads of arch': arch['num_heads']})
        if arch['embed_dims'] % arch['num_heads']:
            raise ValueError(
                f'num_heads of arch must divide embed_dims, got {arch["num_heads"]} and {arch["embed_dims"]}'
            )
        return arch

    def _absolute(self, name: str, indices: int | Sequence[int]) -> tuple[int, ...]:
        given = as_indices(name, indices)
        absolute = tuple(i + self.depth if i < 0 else i for i in given)
        if any(not 0 <= i < self.depth for i in absolute):
            raise ValueError(f'{name} must be within 0 to {self.depth - 1}, got {indices}')
        return absolute

    def _embeddings(self) -> tuple[str, ...]:
        return ('pos_embed', 'cls_token') if self.with_cls_token else ('pos_embed',)

    @property
    def out_channels(self) -> tuple[int, ...]:
        """Channels of each output."""
        return (self.embed_dims,) * len(self.out_indices)

    @property
    def out_strides(self) -> tuple[int, ...]:
        """Stride of each output map, pixels."""
        return (self.patch_embed.patch_stride,) * len(self.out_indices)

    # ---- parameters

    def init_weights(self) -> None:
        """Initialise all parameters, then load what ``init_cfg`` names."""
        if not self.is_init:
            nn.init.zeros_(self.patch_embed.proj.bias)
            lecun_normal_(self.patch_embed.proj.weight)
            for name in self._embeddings():
                nn.init.trunc_normal_(getattr(self, name), std=0.02)
            for block in self.blocks:
                block.init_weights()
            if self.final_norm:
                self.norm.reset_parameters()
        super().init_weights()

    def no_weight_decay(self) -> set[str]:
        """Names of the parameters, other than biases and norms, to which no weight decay applies."""
        return set(self._embeddings())

    def get_layer_depth(self, param_name: str, prefix: str = '') -> tuple[int, int]:
        """Depth of a parameter for layer-wise learning rates.

        Args:
            param_name: name of the parameter.
            prefix: what stands before this module's names in it.

        Returns:
            The depth, and the number of depths: 0 is the patch embedding with positions and class token, i + 1 block
            i, the last the final norm and all that follows the backbone.
        """
        num_depths = self.depth + 2
        name = param_name.removeprefix(prefix) if param_name.startswith(prefix) else ''
        if name.startswith('patch_embed.') or name in self._embeddings():
            return 0, num_depths
        if name.startswith('blocks.'):
            return int(name.split('.')[1]) + 1, num_depths
        return num_depths - 1, num_depths

    def _frozen_modules(self) -> list[nn.Module]:
        if self.frozen_stages < 0:
            return []
        return [self.patch_embed, self.drop_after_pos, *self.blocks[: self.frozen_stages]]

    def train(self, mode: bool = True):
        """Set training mode; frozen stages stay in evaluation mode."""
        super().train(mode)
        for module in self._frozen_modules():
            module.eval()
        return self

    # ---- forward

    def positions(self, grid: tuple[int, int]) -> Tensor:
        """Position table (1, L, D) of a grid (h, w) of patches, with the entry of the class token first."""
        if surely_equal(grid, self.grid):
            return self.pos_embed
        return self.position_cache.get(self.pos_embed, tuple(grid), lambda: self._resized_positions(grid))

    def _resized_positions(self, grid: tuple[int, int]) -> Tensor:
        token, patches = self.pos_embed.split((int(self.with_cls_token), self.grid[0] * self.grid[1]), dim=1)
        return torch.cat((token, resize_pos_embed(patches, self.grid, grid, self.interpolate_mode)), dim=1)

    def forward(self, x: Tensor) -> tuple[Tensor, ...]:
        """Image (B, C, H, W) -> one output per entry of out_indices, see ``out_type``."""
        x, grid = self.patch_embed(x)
        if self.with_cls_token:
            x = torch.cat((self.cls_token.to(x.dtype).expand(x.shape[0], -1, -1), x), dim=1)
        x = self.drop_after_pos(x + self.positions(grid))
        outputs = []
        for i, block in enumerate(self.blocks):
            if self.with_cp and torch.is_grad_enabled() and x.requires_grad:
                x = checkpoint(block, x, grid, use_reentrant=False)
            else:
                x = block(x, grid)
            if i in self.out_indices:
                outputs.append(self._read_out(self.norm(x) if i == self.depth - 1 else x, grid))
        return tuple(outputs)

    def _read_out(self, x: Tensor, grid: tuple[int, int]) -> Tensor:
        if self.out_type == 'raw':
            return x
        if self.out_type == 'cls_token':
            return x[:, 0]
        x = x[:, int(self.with_cls_token) :]
        if self.out_type == 'avg_featmap':
            return x.mean(dim=1)
        return x.transpose(1, 2).unflatten(2, grid).contiguous()
