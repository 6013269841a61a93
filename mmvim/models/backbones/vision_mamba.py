"""Vision Mamba (Vim), a plain backbone of bidirectional state-space blocks."""

from collections.abc import Sequence

import torch
from mmcv.cnn.bricks import DropPath
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
    check_interpolation,
    check_numbers,
    check_positive,
    check_rates,
    image_sides,
)
from mmvim.checkpoints import load_published_vim
from mmvim.models.layers.patch_embed import PatchEmbed, PositionCache, lecun_normal_, resize_pos_embed
from mmvim.models.layers.rotary import RotaryEmbedding2d
from mmvim.models.layers.shapes import surely_equal
from mmvim.models.layers.vim_mixer import VimMixer
from mmvim.registry import MODELS
from ssm_kernels import add_rms_norm

# B batch, L tokens with class tokens, D width, h x w grid of patches


def class_token_positions(layout: str | None, num_patches: int) -> tuple[int, ...]:
    """Where the class tokens stand in a sequence of num_patches patch tokens and the class tokens.

    Args:
        layout: 'middle', 'head', 'double' (one at each end) or None.
        num_patches: patch tokens in the sequence.
    """
    return {None: (), 'head': (0,), 'middle': (num_patches // 2,), 'double': (0, num_patches + 1)}[layout]


class VimBlock(nn.Module):
    """Addition to the residual stream, norm, mixer: ``residual += drop_path(hidden); hidden = mixer(norm(residual))``.

    Args:
        embed_dims: width D.
        drop_path_rate: stochastic depth of the hidden state that comes in.
        norm_eps: epsilon of the RMSNorm.
        mixer: arguments of VimMixer.
    """

    def __init__(self, embed_dims: int, drop_path_rate: float, norm_eps: float, mixer: dict) -> None:
        super().__init__()
        self.drop_path = DropPath(drop_path_rate) if drop_path_rate > 0 else nn.Identity()
        self.norm = nn.RMSNorm(embed_dims, eps=norm_eps)
        self.mixer = VimMixer(embed_dims, **mixer)

    def forward(self, hidden: Tensor, residual: Tensor | None, reverse: bool = False) -> tuple[Tensor, Tensor]:
        """Hidden and residual streams (B, L, D) in, the same out; no residual before the first block."""
        # The residual stream is float32 in low-precision models too: 24 small updates add up in it.
        hidden, residual = add_rms_norm(
            self.drop_path(hidden),
            residual,
            self.norm.weight,
            eps=self.norm.eps,
            backend=self.mixer.scan_backend,
        )
        return self.mixer(hidden, reverse), residual


@MODELS.register_module()
class VisionMamba(BaseModule):
    """Vim: a plain vision backbone of bidirectional Mamba blocks (arXiv 2401.09417), linear in the image tokens.

    The state dictionary has the names of the published checkpoints, which load as they are by
    ``init_cfg=dict(type='Pretrained', checkpoint=...)``: class-token entries of the position table are dropped
    from where they stand and the table is interpolated to the grid of ``img_size``. Images of any size work; the
    positions are interpolated to theirs at run time.

    Args:
        arch: a name in ``arch_zoo`` ('tiny', 'small', 'base', or their short forms), or a dict with 'embed_dims'
            and 'depth' and optionally 'd_state', 'd_conv', 'expand' and 'dt_rank'. Depth 0, with out_indices=-1, is
            the patch embedding with positions alone, for controls.
        img_size: size for which positions are stored, pixels; an int or (height, width).
        patch_size: side of a patch, pixels.
        patch_stride: distance of neighbouring patches, pixels; patch_size if None.
        in_channels: channels of the image.
        out_indices: blocks whose output is returned, counted from 0; negative ones count from the end. Blocks
            behind the last one wanted are not built.
        out_type: what is returned for each of them. 'cls_token' (B, D), the mean of both if there are two;
            'avg_featmap' (B, D), mean over patches; 'last_token' (B, D); 'featmap' (B, D, h, w);
            'raw' (B, L, D), all tokens with the class tokens.
        cls_token: 'middle', 'head', 'double' or None.
        directions: the paper's strategies. 'v2', bidirectional SSM and conv1d; 'v1', bidirectional SSM; 'none';
            'block', blocks in pairs, the second of each backwards; 'sequence', in training a batch is scanned
            backwards with probability ``reverse_prob``.
        divide_output: halve the sum of the two directions of 'v2', as the published checkpoints do; not to is for 'v2'
            only.
        reverse_prob: see ``directions='sequence'``, which alone has it; 0.5 there if None.
        rotary: rotary position embedding before every block; None, on the 'hidden' stream, or on 'both' streams.
        rotary_pretrain_size: side of the pre-training grid that rotary angles span, patches; 14 if None.
        layer_scale_init: start value of a scale per channel on each mixer's result; none if None.
        feature_source: 'residual', the residual stream with a block's output added to it, as the next block has it:
            after its rotary embedding and, in training, with its stochastic depth. After the last block nothing is
            rotated, and stochastic depth is the classifier's alone: maps have none, as in the released code. 'mixer',
            the block's output alone. None means 'mixer' for 'featmap' (the released ADE20K recipe of the tiny
            model) and 'residual' otherwise (the classifier).
        final_norm: pass the last block's output through ``norm_f``. None means not for 'featmap' only.
        drop_rate: dropout after the positions were added.
        drop_path_rate: stochastic depth; 0 in block 0, rising to this rate at the end.
        norm_eps: epsilon of the norms.
        frozen_stages: 0 freezes the patch embedding, positions and class tokens, i the first i blocks as well;
            -1 nothing.
        with_cp: gradient checkpointing, one checkpoint a block.
        interpolate_mode: interpolation of positions.
        scan_backend: backend of all operators of ssm_kernels in the model, norms included; each takes the fastest that
            can run if None.
        init_cfg: initialisation of mmengine.

    Raises:
        ValueError: if an argument has no legal value; the message gives the legal ones.
    """

    arch_zoo = {
        **dict.fromkeys(('ti', 'tiny'), dict(embed_dims=192, depth=24)),
        **dict.fromkeys(('s', 'small'), dict(embed_dims=384, depth=24)),
        **dict.fromkeys(('b', 'base'), dict(embed_dims=768, depth=24)),
    }
    OUT_TYPES = ('cls_token', 'avg_featmap', 'last_token', 'featmap', 'raw')
    CLS_TOKENS = ('middle', 'head', 'double', None)
    DIRECTIONS = ('v2', 'v1', 'none', 'block', 'sequence')

    def __init__(
        self,
        arch: str | dict = 'tiny',
        img_size: int | Sequence[int] = 224,
        patch_size: int = 16,
        patch_stride: int | None = None,
        in_channels: int = 3,
        out_indices: int | Sequence[int] = -1,
        out_type: str = 'cls_token',
        cls_token: str | None = 'middle',
        directions: str = 'v2',
        divide_output: bool = True,
        reverse_prob: float | None = None,
        rotary: str | None = None,
        rotary_pretrain_size: float | None = None,
        layer_scale_init: float | None = None,
        feature_source: str | None = None,
        final_norm: bool | None = None,
        drop_rate: float = 0.0,
        drop_path_rate: float = 0.0,
        norm_eps: float = 1e-5,
        frozen_stages: int = -1,
        with_cp: bool = False,
        interpolate_mode: str = 'bicubic',
        scan_backend: str | None = None,
        init_cfg: dict | None = None,
    ) -> None:
        super().__init__(init_cfg)
        check_init_cfg(init_cfg)
        settings = self._arch_settings(arch)
        self.embed_dims = settings.pop('embed_dims')
        self.depth = settings.pop('depth')
        patch_stride = patch_size if patch_stride is None else patch_stride
        check_numbers(patch_size=patch_size, patch_stride=patch_stride, in_channels=in_channels)
        check_interpolation(interpolate_mode)
        check_choice('out_type', out_type, self.OUT_TYPES)
        check_choice('cls_token', cls_token, self.CLS_TOKENS)
        check_choice('directions', directions, self.DIRECTIONS)
        check_choice('rotary', rotary, (None, 'hidden', 'both'))
        check_choice('feature_source', feature_source, (None, 'residual', 'mixer'))
        if out_type == 'cls_token' and cls_token is None:
            raise ValueError(
                "out_type='cls_token' needs a class token: set cls_token, or out_type to one of "
                f'{tuple(t for t in self.OUT_TYPES if t != "cls_token")}'
            )
        check_rates(drop_rate=drop_rate, drop_path_rate=drop_path_rate)
        check_divide_output(divide_output, directions)
        check_flags(with_cp=with_cp)
        if final_norm is not None:
            check_flags(final_norm=final_norm)
        check_positive(norm_eps=norm_eps)
        if layer_scale_init is not None:
            check_positive(layer_scale_init=layer_scale_init)
        self._check_use(directions, reverse_prob, rotary, rotary_pretrain_size)
        check_backend(scan_backend)
        self.out_type = out_type
        self.cls_layout = cls_token
        self.directions = directions
        self.reverse_prob = 0.5 if reverse_prob is None else reverse_prob
        self.rotary_mode = rotary
        self.feature_source = feature_source or ('mixer' if out_type == 'featmap' else 'residual')
        self.final_norm = out_type != 'featmap' if final_norm is None else final_norm
        self.with_cp = with_cp
        self.interpolate_mode = interpolate_mode
        self.out_indices = self._absolute_indices(out_indices)
        self.frozen_stages = frozen_stages

        self.patch_embed = PatchEmbed(in_channels, self.embed_dims, patch_size, patch_stride)
        self.grid = self.patch_embed.grid_size(*image_sides(img_size))
        num_patches = self.grid[0] * self.grid[1]
        for name in self._class_token_names():
            self.register_parameter(name, nn.Parameter(torch.zeros(1, 1, self.embed_dims)))
        num_tokens = num_patches + len(self._class_token_names())
        self.pos_embed = nn.Parameter(torch.zeros(1, num_tokens, self.embed_dims))
        self.position_cache = PositionCache()
        self.drop_after_pos = nn.Dropout(drop_rate)
        self.rotary = RotaryEmbedding2d(self.embed_dims, rotary_pretrain_size or 14) if rotary else None

        mixer = dict(
            settings,
            directions=directions if directions in ('v2', 'v1') else 'none',
            divide_output=divide_output,
            layer_scale_init=layer_scale_init,
            scan_backend=scan_backend,
        )
        rates = torch.linspace(0, drop_path_rate, self.depth, dtype=torch.float64, device='cpu').tolist()
        rates = [0.0, *rates[:-1], drop_path_rate]
        built = max(self.out_indices) + 1
        self.layers = nn.ModuleList(VimBlock(self.embed_dims, rates[i], norm_eps, mixer) for i in range(built))
        self.norm_f = nn.RMSNorm(self.embed_dims, eps=norm_eps) if self.final_norm else nn.Identity()
        self.drop_path = DropPath(rates[built]) if rates[built] > 0 else nn.Identity()
        self._freeze_stages()
        load_published_vim(self)

    # ---- arguments

    @staticmethod
    def _check_use(
        directions: str, reverse_prob: float | None, rotary: str | None, rotary_pretrain_size: float | None
    ) -> None:
        """Refuse arguments of a setting that is not chosen, and illegal ones of one that is."""
        if reverse_prob is not None:
            if directions != 'sequence':
                raise ValueError(
                    f"reverse_prob={reverse_prob!r} is for directions='sequence', got directions={directions!r}: leave "
                    'reverse_prob out'
                )
            if type(reverse_prob) not in (int, float) or not 0 <= reverse_prob <= 1:
                raise ValueError(f'reverse_prob must be in [0, 1], got {reverse_prob!r}')
        if rotary_pretrain_size is not None:
            check_positive(rotary_pretrain_size=rotary_pretrain_size)
            if rotary is None:
                raise ValueError("rotary_pretrain_size needs rotary='hidden' or 'both': set it, or leave the size out")

    def _arch_settings(self, arch: str | dict) -> dict:
        if isinstance(arch, str):
            check_choice('arch', arch.lower(), tuple(self.arch_zoo))
            return dict(self.arch_zoo[arch.lower()])
        optional = {'d_state', 'd_conv', 'expand', 'dt_rank'}
        if not isinstance(arch, dict) or not {'embed_dims', 'depth'} <= set(arch) <= {'embed_dims', 'depth'} | optional:
            raise ValueError(
                f'arch must be one of {tuple(self.arch_zoo)} or a dict with embed_dims, depth and optionally '
                f'{sorted(optional)}, got {arch!r}'
            )
        check_arch(arch)
        check_numbers(0, **{'depth of arch': arch['depth']})
        return dict(arch)

    def _absolute_indices(self, out_indices: int | Sequence[int]) -> tuple[int, ...]:
        given = as_indices('out_indices', out_indices)
        if self.depth == 0 and given == (-1,):
            return given
        indices = tuple(i + self.depth if i < 0 else i for i in given)
        if not indices or list(indices) != sorted(set(indices)) or not 0 <= indices[0] <= indices[-1] < self.depth:
            raise ValueError(f'out_indices must rise within 0 to {self.depth - 1}, got {out_indices}')
        if self.directions == 'block':
            if self.depth % 2 or any(i % 2 == 0 for i in indices):
                raise ValueError(
                    "directions='block' joins blocks in pairs: depth must be even and out_indices odd, got "
                    f'depth {self.depth} and out_indices {out_indices}'
                )
        if self.final_norm and indices[-1] != self.depth - 1:
            raise ValueError(
                f'final_norm belongs to the last block, {self.depth - 1}, which out_indices {out_indices} leaves out: '
                'add it, or set final_norm=False'
            )
        return indices

    def _class_token_names(self) -> tuple[str, ...]:
        return {None: (), 'double': ('cls_token_head', 'cls_token_tail')}.get(self.cls_layout, ('cls_token',))

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
            for name in ('pos_embed', *self._class_token_names()):
                nn.init.trunc_normal_(getattr(self, name), std=0.02)
            for layer in self.layers:
                layer.mixer.init_weights(self.depth)
        super().init_weights()

    def no_weight_decay(self) -> set[str]:
        """Names of the parameters, other than biases and norms, to which no weight decay applies."""
        last_parts = {'pos_embed', 'A_log', 'A_b_log', 'D', 'D_b', *self._class_token_names()}
        return {name for name, _ in self.named_parameters() if name.rpartition('.')[2] in last_parts}

    def get_layer_depth(self, param_name: str, prefix: str = '') -> tuple[int, int]:
        """Depth of a parameter for layer-wise learning rates.

        Args:
            param_name: name of the parameter.
            prefix: what stands before this module's names in it.

        Returns:
            The depth, and the number of depths: 0 is the patch embedding with positions and class tokens, i + 1
            block i, the last the final norm and all that follows the backbone.
        """
        num_depths = self.depth + 2
        name = param_name.removeprefix(prefix) if param_name.startswith(prefix) else ''
        if name.startswith('patch_embed.') or name in ('pos_embed', *self._class_token_names()):
            return 0, num_depths
        if name.startswith('layers.'):
            return int(name.split('.')[1]) + 1, num_depths
        return num_depths - 1, num_depths

    def _frozen_modules(self) -> list[nn.Module]:
        if self.frozen_stages < 0:
            return []
        return [self.patch_embed, self.drop_after_pos, *self.layers[: self.frozen_stages]]

    def _freeze_stages(self) -> None:
        check_frozen_stages(self.frozen_stages, self.depth)
        for module in self._frozen_modules():
            module.requires_grad_(False)
        if self.frozen_stages >= 0:
            for name in ('pos_embed', *self._class_token_names()):
                getattr(self, name).requires_grad_(False)

    def train(self, mode: bool = True):
        """Set training mode; frozen stages stay in evaluation mode."""
        super().train(mode)
        for module in self._frozen_modules():
            module.eval()
        return self

    # ---- forward

    def positions(self, grid: tuple[int, int]) -> Tensor:
        """Position table (1, L, D) of a grid (h, w) of patches, with the entries of the class tokens in place."""
        if surely_equal(grid, self.grid):
            return self.pos_embed
        return self.position_cache.get(self.pos_embed, tuple(grid), lambda: self._resized_positions(grid))

    def _resized_positions(self, grid: tuple[int, int]) -> Tensor:
        patches = resize_pos_embed(
            self._patch_tokens(self.pos_embed, self.grid), self.grid, grid, self.interpolate_mode
        )
        return self._insert(patches, self._class_tokens(self.pos_embed, self.grid))

    def _insert(self, patches: Tensor, tokens: list[Tensor]) -> Tensor:
        """Put class tokens (B, 1, D) where they belong among patch tokens (B, h*w, D)."""
        if not tokens:
            return patches
        if self.cls_layout == 'double':
            return torch.cat((tokens[0], patches, tokens[1]), dim=1)
        (at,) = class_token_positions(self.cls_layout, patches.shape[1])
        return torch.cat((patches[:, :at], tokens[0], patches[:, at:]), dim=1)

    def _class_tokens(self, x: Tensor, grid: tuple[int, int]) -> list[Tensor]:
        """The class tokens (B, 1, D) of a sequence (B, L, D) of a grid (h, w)."""
        return [x[:, i : i + 1] for i in class_token_positions(self.cls_layout, grid[0] * grid[1])]

    def _patch_tokens(self, x: Tensor, grid: tuple[int, int]) -> Tensor:
        """The patch tokens (B, h*w, D) of a sequence (B, L, D) of a grid (h, w)."""
        if self.cls_layout is None:
            return x
        first = class_token_positions(self.cls_layout, grid[0] * grid[1])[0]
        if self.cls_layout == 'middle':
            return torch.cat((x[:, :first], x[:, first + 1 :]), dim=1)
        return x[:, first + 1 : first + 1 + grid[0] * grid[1]]

    def forward(self, x: Tensor) -> tuple[Tensor, ...]:
        """Image (B, C, H, W) -> one output per entry of out_indices, see ``out_type``."""
        patches, grid = self.patch_embed(x)
        tokens = [
            getattr(self, name).to(patches.dtype).expand(x.shape[0], -1, -1) for name in self._class_token_names()
        ]
        hidden = self.drop_after_pos(self._insert(patches, tokens) + self.positions(grid))
        if self.depth == 0:
            return (self._read_out(self.norm_f(hidden), grid),)
        residual = None
        tables = self._rotary_tables(grid, hidden)
        backwards = self.directions == 'sequence' and self.training and bool(torch.rand(()) < self.reverse_prob)

        outputs = []
        step = 2 if self.directions == 'block' else 1
        for i in range(0, len(self.layers), step):
            hidden, residual = self._rotate(hidden, residual, tables)
            if self.directions == 'block':
                forward = self._run(self.layers[i], hidden, residual, False)
                backward = self._run(self.layers[i + 1], hidden, residual, True)
                stream = forward[1]
                hidden, residual = forward[0] + backward[0], forward[1] + backward[1]
            else:
                hidden, residual = self._run(self.layers[i], hidden, residual, backwards)
                stream = residual
            if self.feature_source == 'residual' and i - 1 in self.out_indices:
                outputs.append(self._read_out(stream, grid))
            elif self.feature_source == 'mixer' and i + step - 1 in self.out_indices[:-1]:
                outputs.append(self._read_out(hidden, grid))
        return (*outputs, self._read_out(self._last_feature(hidden, residual, tables), grid))

    def _run(self, layer: VimBlock, hidden: Tensor, residual: Tensor | None, reverse: bool) -> tuple[Tensor, Tensor]:
        if self.with_cp and torch.is_grad_enabled() and hidden.requires_grad:
            return checkpoint(layer, hidden, residual, reverse, use_reentrant=False)
        return layer(hidden, residual, reverse)

    def _rotary_tables(self, grid: tuple[int, int], like: Tensor) -> tuple[Tensor, Tensor] | None:
        """Tables for all tokens; class tokens get angle zero, that is, they stay as they are."""
        if self.rotary is None:
            return None
        cos, sin = self.rotary.tables(grid, like.device)
        if self.cls_layout is None:
            return cos, sin
        still = [torch.ones_like(cos[None, :1])] * len(self._class_token_names())
        none = [torch.zeros_like(sin[None, :1])] * len(still)
        return self._insert(cos[None], still)[0], self._insert(sin[None], none)[0]

    def _rotate(
        self, hidden: Tensor, residual: Tensor | None, tables: tuple[Tensor, Tensor] | None
    ) -> tuple[Tensor, Tensor | None]:
        if tables is not None:
            hidden = self.rotary(hidden, *tables)
            if residual is not None and self.rotary_mode == 'both':
                residual = self.rotary(residual, *tables)
        return hidden, residual

    def _last_feature(self, hidden: Tensor, residual: Tensor, tables: tuple[Tensor, Tensor] | None) -> Tensor:
        if self.feature_source == 'residual':
            at_end = len(self.layers) == self.depth
            if not at_end:  # there is a next block, though it is not built
                hidden, residual = self._rotate(hidden, residual, tables)
            hidden = residual + (hidden if at_end and self.out_type == 'featmap' else self.drop_path(hidden))
        if self.final_norm:
            hidden = self.norm_f(hidden.to(self.norm_f.weight.dtype))
        return hidden

    def _read_out(self, x: Tensor, grid: tuple[int, int]) -> Tensor:
        if self.out_type == 'raw':
            return x
        if self.out_type == 'last_token':
            return x[:, -1]
        if self.out_type == 'cls_token':
            return torch.cat(self._class_tokens(x, grid), dim=1).mean(dim=1)
        x = self._patch_tokens(x, grid)
        if self.out_type == 'avg_featmap':
            return x.mean(dim=1)
        return x.transpose(1, 2).unflatten(2, grid).contiguous()
