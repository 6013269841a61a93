"""MambaVision, a hierarchical backbone of convolutions, selective scans and attention."""

from collections.abc import Iterable, Sequence

import torch
from mmengine.utils.dl_utils.parrots_wrapper import _BatchNorm
from torch import Tensor, nn

from mmvim.arguments import four_numbers
from mmvim.models.backbones.mambavision.mixer import (
    CONVS,
    DT_INITS,
    MERGES,
    PLACES,
    MambaVisionMixer,
    attention_places,
)
from mmvim.models.backbones.mambavision.weights import WEIGHTS
from mmvim.models.base import HierarchicalBackbone, Stage
from mmvim.models.layers.drop_path import drop_path, drop_path_rates
from mmvim.models.layers.norm import LayerNorm2d
from mmvim.models.layers.transformer import Mlp, SelfAttention
from mmvim.models.layers.windows import from_windows, to_windows, window_shape
from mmvim.registry import MODELS

# B batch, C channels of a level, H x W its map, K windows in a map, L tokens in a window

CONV_LEVELS = 2  # levels 0 and 1 are convolutional, the others work on windows


class Stem(nn.Module):
    """Two convolutions of stride 2, each with BatchNorm and ReLU.

    Args:
        in_channels: channels of the image.
        stem_channels: channels between the convolutions.
        embed_dims: channels of the result.
    """

    def __init__(self, in_channels: int, stem_channels: int, embed_dims: int) -> None:
        super().__init__()
        self.conv_down = nn.Sequential(
            nn.Conv2d(in_channels, stem_channels, 3, 2, 1, bias=False),
            nn.BatchNorm2d(stem_channels, eps=1e-4),
            nn.ReLU(),
            nn.Conv2d(stem_channels, embed_dims, 3, 2, 1, bias=False),
            nn.BatchNorm2d(embed_dims, eps=1e-4),
            nn.ReLU(),
        )

    def forward(self, x: Tensor) -> Tensor:
        """Image (B, channels, H, W) -> map (B, C, H/4, W/4), sides rounded up."""
        return self.conv_down(x)


class ConvBlock(nn.Module):
    """Residual block of two convolutions with BatchNorm, and GELU in its tanh form between them.

    Args:
        channels: channels C.
        drop_path_rate: stochastic depth.
    """

    def __init__(self, channels: int, drop_path_rate: float) -> None:
        super().__init__()
        self.conv1 = nn.Conv2d(channels, channels, 3, padding=1)
        self.norm1 = nn.BatchNorm2d(channels)
        self.act = nn.GELU('tanh')
        self.conv2 = nn.Conv2d(channels, channels, 3, padding=1)
        self.norm2 = nn.BatchNorm2d(channels)
        self.drop_path = drop_path(drop_path_rate)

    def forward(self, x: Tensor) -> Tensor:
        """Map (B, C, H, W) -> map (B, C, H, W)."""
        return x + self.drop_path(self.norm2(self.conv2(self.act(self.norm1(self.conv1(x))))))


class WindowBlock(nn.Module):
    """Pre-norm residual block of a token mixer and an MLP; the mixer sees every window by itself.

    Args:
        embed_dims: channels C.
        mixer: the token mixer, (B*K, L, C) -> (B*K, L, C).
        mlp_ratio: width of the MLP over C.
        layer_scale: start value of a scale per channel on both branches; no such scale if None.
        drop_path_rate: stochastic depth, per image and not per window.
    """

    def __init__(
        self, embed_dims: int, mixer: nn.Module, mlp_ratio: float, layer_scale: float | None, drop_path_rate: float
    ) -> None:
        super().__init__()
        self.norm1 = nn.LayerNorm(embed_dims)
        self.mixer = mixer
        self.norm2 = nn.LayerNorm(embed_dims)
        self.mlp = Mlp(embed_dims, int(embed_dims * mlp_ratio))
        self.drop_path = drop_path(drop_path_rate)
        self.layer_scale = layer_scale
        if layer_scale is not None:
            self.gamma_1 = nn.Parameter(torch.full((embed_dims,), float(layer_scale)))
            self.gamma_2 = nn.Parameter(torch.full((embed_dims,), float(layer_scale)))

    def init_weights(self) -> None:
        """Initialise all parameters."""
        self.mixer.init_weights()
        self.mlp.init_weights()
        for norm in (self.norm1, self.norm2):
            norm.reset_parameters()
        if self.layer_scale is not None:
            nn.init.constant_(self.gamma_1, self.layer_scale)
            nn.init.constant_(self.gamma_2, self.layer_scale)

    def forward(self, x: Tensor, images: int) -> Tensor:
        """Tokens (B*K, L, C) of all windows of this many images -> tokens (B*K, L, C)."""
        mixed = self.mixer(self.norm1(x))
        x = x + self._drop(mixed if self.layer_scale is None else mixed * self.gamma_1, images)
        mixed = self.mlp(self.norm2(x))
        return x + self._drop(mixed if self.layer_scale is None else mixed * self.gamma_2, images)

    def _drop(self, x: Tensor, images: int) -> Tensor:
        if not self.training or isinstance(self.drop_path, nn.Identity):
            return x
        return self.drop_path(x.unflatten(0, (images, -1))).flatten(0, 1)


class Downsample(nn.Module):
    """Convolution of stride 2 that doubles the channels.

    Args:
        channels: channels C.
    """

    def __init__(self, channels: int) -> None:
        super().__init__()
        self.reduction = nn.Sequential(nn.Conv2d(channels, 2 * channels, 3, 2, 1, bias=False))

    def forward(self, x: Tensor) -> Tensor:
        """Map (B, C, H, W) -> map (B, 2C, H/2, W/2), sides rounded up."""
        return self.reduction(x)


class Level(Stage):
    """Blocks of one resolution, and what leads to the next.

    Args:
        blocks: the blocks.
        downsample: what leads to the next level; None behind the last that is built.
        window: side of the windows that the blocks work on; None for blocks that work on maps.
        fit_windows: see ``MambaVision``.
        with_cp: see ``MambaVision``.
    """

    def __init__(
        self,
        blocks: Iterable[nn.Module],
        downsample: nn.Module | None,
        window: int | None,
        fit_windows: bool,
        with_cp: bool,
    ) -> None:
        super().__init__(blocks, downsample, with_cp)
        self.window = window
        self.fit_windows = fit_windows

    def forward(self, x: Tensor, *_: object) -> Tensor:
        """Map (B, C, H, W) -> map (B, C, H, W), not down-sampled."""
        if self.window is None:
            return super().forward(x)
        size, images = x.shape[-2:], x.shape[0]
        window = window_shape(size, self.window, self.fit_windows)
        return from_windows(super().forward(to_windows(x, window, size), images), window, images, size)


def _size(embed_dims: int, stem_channels: int, depths: tuple, num_heads: tuple, **more: float) -> dict:
    return dict(embed_dims=embed_dims, stem_channels=stem_channels, depths=depths, num_heads=num_heads, **more)


@MODELS.register_module()
class MambaVision(HierarchicalBackbone):
    """MambaVision: two levels of convolutions, two of selective scans and attention in windows (arXiv 2407.08083).

    The state dictionary has the names of the published checkpoints, which load as they are by
    ``init_cfg=dict(type='Pretrained', checkpoint=...)``. Images of any size of at least 4x4 pixels work; the sides of
    every level's map are those of the level before it, halved and rounded up. In training, BatchNorm refuses a map of
    a single position in a batch of one image: use more images, larger ones, or ``norm_eval``.

    Args:
        arch: a name in ``arch_zoo`` ('tiny', 'tiny2', 'small', 'base', 'large', 'large2', 'large3'), or a dict with
            'embed_dims' (channels of level 0; every level has twice as many as the one before it), 'stem_channels',
            'depths' and 'num_heads' (four numbers each) and optionally 'layer_scale' (start value, None for none),
            'mlp_ratio', 'd_state' and 'd_conv'.
        in_channels: channels of the image.
        out_indices: levels whose output is returned, counted from 0; negative ones count from the end. None means all
            four, or the last for 'avg_featmap'. Levels behind the last one wanted are not built.
        out_type: 'featmap', maps (B, C, H, W) that pass a LayerNorm over the channels, ``outnorm0`` to ``outnorm3``,
            which ImageNet files lack; 'raw', the maps without it; 'avg_featmap', of the last level only, BatchNorm
            ``norm`` and the mean over the map, (B, C), for the published classifier.
        window_sizes: side of the windows of each level, in positions of its map; levels 0 and 1 have none, and their
            entries are not used. Published: (8, 8, 14, 7) at 224, (8, 8, 64, 32) for ADE20K at 512 (small:
            (8, 8, 160, 56)), (8, 8, 112, 56) for COCO.
        fit_windows: False, as published: every window has its full size, the map is padded to a multiple of it with
            zeros, and the padding takes part in scan and attention. True: as few windows as cover the map, equally
            large and no larger than they must be, so that less is padded, and nothing where the map is smaller than
            the window. It changes the results wherever there was padding: for training from ImageNet weights.
        attention: which blocks of levels 2 and 3 are attention, the others being mixers: 'last' half, as published
            (of an odd number the smaller half), 'early', 'middle', 'none', 'all', or l for every l-th block.
        mixer_conv: 'same', as published, or 'causal' convolutions in the mixer.
        mixer_symmetric: whether the mixer's branch without a scan has a convolution, as published.
        mixer_merge: 'concat' of the mixer's branches, as published, or 'gate', their product.
        dt_init: 'published', delta's projection initialised like any linear layer, or 'mamba', as Mamba has it.
        drop_path_rate: stochastic depth, from 0 in the first block to this rate in the last one of all levels.
        frozen_stages: 0 freezes the stem, i the first i levels as well; -1 nothing.
        norm_eval: keep all BatchNorm layers in evaluation mode, so that their statistics stay.
        with_cp: gradient checkpointing, one checkpoint a block.
        scan_backend: backend of all operators of ssm_kernels in the model; each takes the fastest that can run if None.
        init_cfg: initialisation of mmengine.

    Raises:
        ValueError: if an argument has no legal value; the message gives the legal ones.
    """

    arch_zoo = {
        **dict.fromkeys(('t', 'tiny'), _size(80, 32, (1, 3, 8, 4), (2, 4, 8, 16))),
        **dict.fromkeys(('t2', 'tiny2'), _size(80, 32, (1, 3, 11, 4), (2, 4, 8, 16))),
        **dict.fromkeys(('s', 'small'), _size(96, 64, (3, 3, 7, 5), (2, 4, 8, 16))),
        **dict.fromkeys(('b', 'base'), _size(128, 64, (3, 3, 10, 5), (2, 4, 8, 16), layer_scale=1e-5)),
        **dict.fromkeys(('l', 'large'), _size(196, 64, (3, 3, 10, 5), (4, 8, 16, 32), layer_scale=1e-5)),
        **dict.fromkeys(('l2', 'large2'), _size(196, 64, (3, 3, 12, 5), (4, 8, 16, 32), layer_scale=1e-5)),
        **dict.fromkeys(('l3', 'large3'), _size(256, 64, (3, 3, 20, 10), (4, 8, 16, 32), layer_scale=1e-5)),
    }
    ARCH = ('embed_dims', 'stem_channels', 'depths', 'num_heads'), ('layer_scale', 'mlp_ratio', 'd_state', 'd_conv')
    OUT_TYPES = ('featmap', 'raw', 'avg_featmap')
    CHOICES = dict(mixer_conv=CONVS, mixer_merge=MERGES, dt_init=DT_INITS)
    BLOCKS, STAGE = 'levels', 'level'
    NO_DECAY = ('A_log', 'D')
    WEIGHTS = WEIGHTS

    def __init__(
        self,
        arch: str | dict = 'tiny',
        in_channels: int = 3,
        out_indices: int | Sequence[int] | None = None,
        out_type: str = 'featmap',
        window_sizes: Sequence[int] = (8, 8, 14, 7),
        fit_windows: bool = False,
        attention: str | int = 'last',
        mixer_conv: str = 'same',
        mixer_symmetric: bool = True,
        mixer_merge: str = 'concat',
        dt_init: str = 'published',
        drop_path_rate: float = 0.0,
        frozen_stages: int = -1,
        norm_eval: bool = False,
        with_cp: bool = False,
        scan_backend: str | None = None,
        init_cfg: dict | None = None,
    ) -> None:
        super().__init__(locals(), stride=4)
        mixer = dict(conv=mixer_conv, symmetric=mixer_symmetric, merge=mixer_merge, dt_init=dt_init)
        self._check_attention(attention, mixer)
        self.num_heads = self._heads()
        self.window_sizes = (8, 8, *four_numbers('window_sizes', window_sizes, 'level')[CONV_LEVELS:])
        self.fit_windows = fit_windows
        self.mixer_conv = mixer_conv
        self.norm_eval = norm_eval

        self.patch_embed = Stem(in_channels, self.settings['stem_channels'], self.embed_dims)
        mixer |= {key: self.settings[key] for key in ('d_state', 'd_conv') if key in self.settings}
        mixer['scan_backend'] = scan_backend
        rates = iter(drop_path_rates(drop_path_rate, sum(self.depths)))
        self.levels = nn.ModuleList()
        for i in range(self.out_indices[-1] + 1):
            width = self.embed_dims * 2**i
            if i < CONV_LEVELS:
                blocks: list[nn.Module] = [ConvBlock(width, next(rates)) for _ in range(self.depths[i])]
            else:
                blocks = [
                    WindowBlock(
                        width,
                        SelfAttention(width, self.num_heads[i]) if attends else MambaVisionMixer(width, **mixer),
                        self.settings.get('mlp_ratio', 4),
                        self.settings.get('layer_scale'),
                        next(rates),
                    )
                    for attends in attention_places(self.depths[i], attention)
                ]
            downsample = Downsample(width) if i < self.out_indices[-1] else None
            window = None if i < CONV_LEVELS else self.window_sizes[i]
            self.levels.append(Level(blocks, downsample, window, fit_windows, with_cp))
        if out_type == 'avg_featmap':
            self.norm = nn.BatchNorm2d(self.out_channels[-1])
        elif out_type == 'featmap':
            self.add_output_norms()
        self.freeze()

    def _check_attention(self, attention: str | int, mixer: dict) -> None:
        """Refuse an illegal ``attention``, and options of a mixer that it leaves no block for."""
        if attention not in PLACES and not (type(attention) is int and attention >= 1):
            raise ValueError(f'attention must be one of {PLACES} or a number l >= 1, got {attention!r}')
        if type(attention) is int and attention > max(self.depths[CONV_LEVELS:]):
            raise ValueError(
                f'attention={attention} leaves no block of levels 2 and 3 for attention, which have {self.depths[2:]}: '
                "set a lower number, or 'none'"
            )
        usual = dict(conv='same', symmetric=True, merge='concat', dt_init='published')
        unused = [key if key == 'dt_init' else f'mixer_{key}' for key in mixer if mixer[key] != usual[key]]
        if attention in ('all', 1) and unused:
            raise ValueError(
                f'attention={attention!r} leaves no mixer for {", ".join(unused)}: leave it out, or set another '
                'attention'
            )

    def _heads(self) -> tuple[int, ...]:
        heads_of_levels = four_numbers('num_heads of arch', self.settings['num_heads'], 'level')
        for i, heads in enumerate(heads_of_levels):
            width = self.embed_dims * 2**i
            if width % heads:
                divisors = [n for n in range(1, width + 1) if width % n == 0]
                raise ValueError(
                    f'num_heads of arch must divide the width of each level: {heads} heads do not divide the '
                    f'{width} channels of level {i}; legal are {divisors}'
                )
        return heads_of_levels

    def init_weights(self) -> None:
        """Initialise all parameters, then load what ``init_cfg`` names."""
        if not self.is_init:
            for module in self.modules():
                if isinstance(module, WindowBlock):
                    module.init_weights()
                elif isinstance(module, nn.Conv2d | _BatchNorm | LayerNorm2d):
                    module.reset_parameters()
        super().init_weights()

    def train(self, mode: bool = True):
        """Set training mode; frozen stages, and with ``norm_eval`` all BatchNorm layers, stay in evaluation mode."""
        super().train(mode)
        if self.norm_eval:
            for module in self.modules():
                if isinstance(module, _BatchNorm):
                    module.eval()
        return self

    def forward(self, x: Tensor) -> tuple[Tensor, ...]:
        """Image (B, channels, H, W) -> one output per entry of out_indices, see ``out_type``.

        Raises:
            ValueError: if a side of the image is shorter than the stem's stride.
        """
        if min(x.shape[-2:]) < 4:
            raise ValueError(
                f'the image has {x.shape[-2]}x{x.shape[-1]} pixels; each side must be at least 4, the stride of the '
                'stem: enlarge or pad it'
            )
        x = self.patch_embed(x)
        outputs = []
        for i, level in enumerate(self.levels):
            x = level(x)
            if i in self.out_indices:
                outputs.append(self._read_out(x, i))
            if i < len(self.levels) - 1:
                x = level.downsample(x)
        return tuple(outputs)

    def _read_out(self, x: Tensor, level: int) -> Tensor:
        if self.out_type == 'raw':
            return x
        if self.out_type == 'avg_featmap':
            return self.norm(x).mean((2, 3))
        return getattr(self, f'outnorm{level}')(x)
