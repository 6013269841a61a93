"""SimpleFeaturePyramid of ViTDet: a pyramid from the last map of a plain backbone."""

import math
from collections.abc import Sequence

import torch.nn.functional as F
from mmcv.cnn import build_norm_layer
from mmengine.model import BaseModule
from torch import Tensor, nn

from mmvim.arguments import check_init_cfg, check_numbers
from mmvim.registry import MODELS

# B batch, D width of the backbone, C channels of the pyramid


class ConvNorm(nn.Conv2d):
    """Convolution without bias, then a norm that is its sub-module ``norm``, as in detectron2's checkpoints."""

    def __init__(self, in_channels: int, out_channels: int, kernel_size: int, norm_cfg: dict) -> None:
        super().__init__(in_channels, out_channels, kernel_size, padding=kernel_size // 2, bias=False)
        self.norm = build_norm_layer(norm_cfg, out_channels)[1]

    def forward(self, x: Tensor) -> Tensor:
        """Maps (B, channels, H, W) -> maps (B, C, H, W)."""
        return self.norm(super().forward(x))


def _exponent(scale: object) -> float:
    """Binary logarithm; NaN of what has none."""
    return math.log2(scale) if type(scale) in (int, float) and scale > 0 else math.nan


@MODELS.register_module()
class SimpleFPN(BaseModule):
    """Build a feature pyramid from one map by deconvolution and pooling (ViTDet, arXiv 2203.16527, sec. 3).

    Each level resamples the last input map, then applies a 1x1 and a 3x3 convolution with a norm each. Levels
    beyond the scales are subsampled from the last one by 2. The levels' modules are named ``simfp_2`` to
    ``simfp_5`` after log2 of their stride, as in detectron2's checkpoints.

    Args:
        in_channels: width D of the map, or of each of the maps (the last one is used).
        out_channels: channels C of every level; None leaves the widths of resampling and adds no convolution,
            D/4, D/2, D, D for the default scales.
        scales: resolution of each level relative to the map, powers of two from 4 down, fine to coarse.
        num_outs: levels returned; at least len(scales).
        in_stride: stride of the map, pixels, a power of two; for names only.
        norm_cfg: norm of all layers.
        init_cfg: initialisation of mmengine.

    Raises:
        ValueError: if an argument has no legal value, the scales do not fall, or there are more of them than num_outs.
    """

    def __init__(
        self,
        in_channels: int | Sequence[int],
        out_channels: int | None = 256,
        scales: Sequence[float] = (4.0, 2.0, 1.0, 0.5),
        num_outs: int = 5,
        in_stride: int = 16,
        norm_cfg: dict | None = None,
        init_cfg: dict | None = None,
    ) -> None:
        super().__init__(init_cfg)
        check_init_cfg(init_cfg)
        norm_cfg = norm_cfg or dict(type='mmvim.LN2d', eps=1e-6)
        given = in_channels if isinstance(in_channels, list | tuple) else [in_channels]
        width = given[-1] if given else 0
        check_numbers(in_channels=width, num_outs=num_outs, in_stride=in_stride)
        if out_channels is not None:
            check_numbers(out_channels=out_channels)
        if not isinstance(norm_cfg, dict) or 'type' not in norm_cfg:
            raise ValueError(f'norm_cfg must be a dict with a type, got {norm_cfg!r}')
        scales = tuple(scales) if isinstance(scales, list | tuple) else ()
        if not scales or not all(_exponent(scale) in range(-10, 3) for scale in scales):
            raise ValueError(f'each of scales must be a power of two up to 4, got {scales}')
        if list(scales) != sorted(set(scales), reverse=True):
            raise ValueError(f'scales must fall, fine to coarse, got {scales}')
        if in_stride & (in_stride - 1) or in_stride < scales[0]:
            raise ValueError(f'in_stride must be a power of two of at least the largest of scales, got {in_stride}')
        if num_outs < len(scales):
            raise ValueError(f'num_outs must be at least the number of scales, {len(scales)}, got {num_outs}')
        self.num_outs = num_outs
        self.out_channels = []
        self.levels = []
        for scale in scales:
            layers, channels = self._resample(width, scale, norm_cfg)
            if out_channels is not None:
                layers.append(ConvNorm(channels, out_channels, 1, norm_cfg))
                layers.append(ConvNorm(out_channels, out_channels, 3, norm_cfg))
                channels = out_channels
            name = f'simfp_{round(math.log2(in_stride / scale))}'
            self.add_module(name, nn.Sequential(*layers))
            self.levels.append(name)
            self.out_channels.append(channels)
        self.out_channels += self.out_channels[-1:] * (num_outs - len(scales))

    @staticmethod
    def _resample(width: int, scale: float, norm_cfg: dict) -> tuple[list[nn.Module], int]:
        exponent = _exponent(scale)
        if exponent == 2:
            half, quarter = width // 2, width // 4
            first = nn.ConvTranspose2d(width, half, 2, 2)
            return [
                first,
                build_norm_layer(norm_cfg, half)[1],
                nn.GELU(),
                nn.ConvTranspose2d(half, quarter, 2, 2),
            ], quarter
        if exponent == 1:
            return [nn.ConvTranspose2d(width, width // 2, 2, 2)], width // 2
        if exponent == 0:
            return [], width
        return [nn.MaxPool2d(round(1 / scale), ceil_mode=True)], width

    def forward(self, inputs: Tensor | Sequence[Tensor]) -> tuple[Tensor, ...]:
        """Map (B, D, h, w), or maps of which the last is used -> ``num_outs`` maps, fine to coarse."""
        x = inputs if isinstance(inputs, Tensor) else inputs[-1]
        outputs = [getattr(self, name)(x) for name in self.levels]
        while len(outputs) < self.num_outs:
            outputs.append(F.max_pool2d(outputs[-1], 1, 2))
        return tuple(outputs)
