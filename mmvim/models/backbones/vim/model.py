"""Vision Mamba (Vim), a plain backbone of bidirectional state-space blocks."""

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn

from mmvim.arguments import as_indices, check_divide_output, check_numbers
from mmvim.models.backbones.vim.weights import WEIGHTS
from mmvim.models.base import PlainBackbone, run_block
from mmvim.models.layers.class_tokens import class_token_names, insert_class_tokens
from mmvim.models.layers.drop_path import drop_path
from mmvim.models.layers.rotary import RotaryEmbedding2d
from mmvim.models.layers.vim_mixer import VimMixer
from mmvim.registry import MODELS
from ssm_kernels import add_rms_norm

# B batch, L tokens with class tokens, D width, h x w grid of patches


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
        self.drop_path = drop_path(drop_path_rate)
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
class VisionMamba(PlainBackbone):
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
    ARCH = ('embed_dims', 'depth'), ('d_state', 'd_conv', 'expand', 'dt_rank')
    OUT_TYPES = ('cls_token', 'avg_featmap', 'last_token', 'featmap', 'raw')
    CLS_TOKENS = ('middle', 'head', 'double', None)
    DIRECTIONS = ('v2', 'v1', 'none', 'block', 'sequence')
    CHOICES = dict(
        cls_token=CLS_TOKENS,
        directions=DIRECTIONS,
        rotary=(None, 'hidden', 'both'),
        feature_source=(None, 'residual', 'mixer'),
    )
    BLOCKS = 'layers'
    NO_DECAY = ('A_log', 'A_b_log', 'D', 'D_b')
    WEIGHTS = WEIGHTS

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
        super().__init__(locals(), cls_layout=cls_token)
        if out_type == 'cls_token' and cls_token is None:
            raise ValueError(
                "out_type='cls_token' needs a class token: set cls_token, or out_type to one of "
                f'{tuple(t for t in self.OUT_TYPES if t != "cls_token")}'
            )
        check_divide_output(divide_output, directions)
        self._check_use(directions, reverse_prob, rotary, rotary_pretrain_size)
        self.directions = directions
        self.reverse_prob = 0.5 if reverse_prob is None else reverse_prob
        self.rotary_mode = rotary
        self.feature_source = feature_source or ('mixer' if out_type == 'featmap' else 'residual')

        self.add_embeddings(in_channels, img_size, patch_size, patch_stride or patch_size, drop_rate)
        self.rotary = RotaryEmbedding2d(self.embed_dims, rotary_pretrain_size or 14) if rotary else None
        mixer = {key: self.settings[key] for key in self.ARCH[1] if key in self.settings}
        mixer |= dict(
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
        self.drop_path = drop_path(rates[built])
        self.freeze()

    def _check_use(
        self, directions: str, reverse_prob: float | None, rotary: str | None, rotary_pretrain_size: float | None
    ) -> None:
        """Refuse arguments of a setting that is not chosen, and what the chosen directions cannot have."""
        if directions == 'block' and (self.depth % 2 or any(i % 2 == 0 for i in self.out_indices)):
            raise ValueError(
                "directions='block' joins blocks in pairs: depth must be even and out_indices odd, got "
                f'depth {self.depth} and out_indices {self.out_indices}'
            )
        if reverse_prob is not None:
            if directions != 'sequence':
                raise ValueError(
                    f"reverse_prob={reverse_prob!r} is for directions='sequence', got directions={directions!r}: leave "
                    'reverse_prob out'
                )
            if type(reverse_prob) not in (int, float) or not 0 <= reverse_prob <= 1:
                raise ValueError(f'reverse_prob must be in [0, 1], got {reverse_prob!r}')
        if rotary_pretrain_size is not None and rotary is None:
            raise ValueError("rotary_pretrain_size needs rotary='hidden' or 'both': set it, or leave the size out")

    def _arch_settings(self, arch: str | dict) -> dict:
        settings = super()._arch_settings(arch)
        check_numbers(0, **{'depth of arch': settings['depth']})
        return settings

    def _absolute_indices(self, out_indices: int | Sequence[int]) -> tuple[int, ...]:
        if self.depth == 0 and as_indices('out_indices', out_indices) == (-1,):
            return (-1,)
        return super()._absolute_indices(out_indices)

    def init_weights(self) -> None:
        """Initialise all parameters, then load what ``init_cfg`` names."""
        if not self.is_init:
            self.init_embeddings()
            for layer in self.layers:
                layer.mixer.init_weights(self.depth)
        super().init_weights()

    def forward(self, x: Tensor) -> tuple[Tensor, ...]:
        """Image (B, C, H, W) -> one output per entry of out_indices, see ``out_type``."""
        hidden, grid = self.embed(x)
        if self.depth == 0:
            return (self.read_out(self.norm_f(hidden), grid),)
        residual = None
        tables = self._rotary_tables(grid, hidden)
        backwards = self.directions == 'sequence' and self.training and bool(torch.rand(()) < self.reverse_prob)

        outputs = []
        step = 2 if self.directions == 'block' else 1
        for i in range(0, len(self.layers), step):
            hidden, residual = self._rotate(hidden, residual, tables)
            if self.directions == 'block':
                forward = run_block(self.layers[i], self.with_cp, hidden, residual, False)
                backward = run_block(self.layers[i + 1], self.with_cp, hidden, residual, True)
                stream = forward[1]
                hidden, residual = forward[0] + backward[0], forward[1] + backward[1]
            else:
                hidden, residual = run_block(self.layers[i], self.with_cp, hidden, residual, backwards)
                stream = residual
            if self.feature_source == 'residual' and i - 1 in self.out_indices:
                outputs.append(self.read_out(stream, grid))
            elif self.feature_source == 'mixer' and i + step - 1 in self.out_indices[:-1]:
                outputs.append(self.read_out(hidden, grid))
        return (*outputs, self.read_out(self._last_feature(hidden, residual, tables), grid))

    def _rotary_tables(self, grid: tuple[int, int], like: Tensor) -> tuple[Tensor, Tensor] | None:
        """Tables for all tokens; class tokens get angle zero, that is, they stay as they are."""
        if self.rotary is None:
            return None
        cos, sin = self.rotary.tables(grid, like.device)
        count = len(class_token_names(self.cls_layout))
        still, none = [torch.ones_like(cos[None, :1])] * count, [torch.zeros_like(sin[None, :1])] * count
        tables = ((cos, still), (sin, none))
        cos, sin = (insert_class_tokens(self.cls_layout, table[None], own)[0] for table, own in tables)
        return cos, sin

    def _rotate(self, hidden: Tensor, residual: Any, tables: tuple[Tensor, Tensor] | None) -> tuple[Tensor, Any]:
        if self.rotary is not None and tables is not None:
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
