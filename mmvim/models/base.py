"""What backbones share: sizes, outputs, freezing, depths of parameters, checkpointing, loading of weights."""

from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager, nullcontext
from typing import Any

import torch
from mmengine.model import BaseModule
from mmengine.utils.dl_utils.parrots_wrapper import _BatchNorm
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from mmvim.arguments import (
    as_indices,
    check_arch,
    check_arguments,
    check_frozen_stages,
    four_numbers,
    image_sides,
)
from mmvim.models.layers.class_tokens import (
    class_token_names,
    class_tokens,
    insert_class_tokens,
    patch_tokens,
)
from mmvim.models.layers.norm import LayerNorm2d
from mmvim.models.layers.patch_embed import PatchEmbed, lecun_normal_
from mmvim.models.layers.positions import PositionCache, resize_pos_embed
from mmvim.models.layers.shapes import surely_equal
from mmvim.weights.family import Family, load_published

# B batch, L tokens with class tokens, M patch tokens, D width, C channels of a stage, h x w grid of patches or map


class Backbone(BaseModule):
    """Base of all backbones: a stem ``patch_embed``, then blocks, in one row or in stages.

    A subclass sets the class attributes below. Its ``__init__`` passes ``locals()`` to that of the base, builds its
    modules, and ends with `freeze`. `HierarchicalBackbone` and `PlainBackbone` do more of it.

    Attributes:
        arch_zoo: sizes by name.
        ARCH: keys of ``arch`` that must be given, and those that may be.
        OUT_TYPES: legal values of ``out_type``.
        CHOICES: legal values of other arguments that have few.
        BLOCKS: name of the list of blocks or stages.
        NO_DECAY: last parts of the names of parameters without weight decay.
        WEIGHTS: how files of weights are read and fitted.
        depths: blocks of each stage, built or not; a row of blocks has a stage for each.

    Args:
        arguments: all arguments of the subclass by name, ``arch``, ``out_type``, ``frozen_stages`` and ``init_cfg``
            among them. What its ``arch`` says is then in ``settings``.

    Raises:
        ValueError: if an argument has no legal value; the message gives the legal ones.
    """

    arch_zoo: Mapping[str, Mapping] = {}
    ARCH: tuple[Sequence[str], Sequence[str]] = ((), ())
    OUT_TYPES: tuple[str, ...] = ()
    CHOICES: Mapping[str, Iterable] = {}
    BLOCKS = 'blocks'
    NO_DECAY: tuple[str, ...] = ()
    WEIGHTS: Family
    depths: tuple[int, ...]

    def __init__(self, arguments: Mapping[str, object]) -> None:
        super().__init__(arguments['init_cfg'])
        check_arguments(arguments, {'out_type': self.OUT_TYPES, **self.CHOICES})
        self.settings = self._arch_settings(arguments['arch'])
        self.embed_dims = self.settings['embed_dims']
        self.out_type = arguments['out_type']
        self.frozen_stages = arguments['frozen_stages']
        load_published(self)

    def _arch_settings(self, arch: str | dict) -> dict:
        if isinstance(arch, str) and arch.lower() in self.arch_zoo:
            return dict(self.arch_zoo[arch.lower()])
        required, optional = self.ARCH
        if not isinstance(arch, dict) or not set(required) <= set(arch) <= {*required, *optional}:
            raise ValueError(
                f'arch must be one of {tuple(self.arch_zoo)} or a dict with {sorted(required)} and optionally '
                f'{sorted(optional)}, got {arch!r}'
            )
        check_arch(arch)
        return dict(arch)

    def stem_parameters(self) -> tuple[str, ...]:
        """Names of the parameters that come before the first block, beside those of ``patch_embed``."""
        return ()

    def _rising_indices(self, out_indices: int | Sequence[int]) -> tuple[int, ...]:
        count = len(self.depths)
        given = as_indices('out_indices', out_indices)
        indices = tuple(i + count if i < 0 else i for i in given)
        if not indices or list(indices) != sorted(set(indices)) or not 0 <= indices[0] <= indices[-1] < count:
            raise ValueError(f'out_indices must rise within 0 to {count - 1}, got {out_indices}')
        return indices

    # ---- training

    def freeze(self) -> None:
        """Freeze what ``frozen_stages`` says."""
        check_frozen_stages(self.frozen_stages, len(self.depths))
        for module in self._frozen_modules():
            module.requires_grad_(False)
        for name in self.stem_parameters() if self.frozen_stages >= 0 else ():
            getattr(self, name).requires_grad_(False)

    def _frozen_modules(self) -> list[nn.Module]:
        if self.frozen_stages < 0:
            return []
        drop = [self.drop_after_pos] if hasattr(self, 'drop_after_pos') else []
        return [self.patch_embed, *drop, *getattr(self, self.BLOCKS)[: self.frozen_stages]]

    def train(self, mode: bool = True):
        """Set training mode; frozen stages stay in evaluation mode."""
        super().train(mode)
        for module in self._frozen_modules():
            module.eval()
        return self

    def no_weight_decay(self) -> set[str]:
        """Names of the parameters, other than biases, norms and scales, to which no weight decay applies."""
        last_parts = {*self.NO_DECAY, *self.stem_parameters()}
        return {name for name, _ in self.named_parameters() if name.rpartition('.')[2] in last_parts}

    def get_layer_depth(self, param_name: str, prefix: str = '') -> tuple[int, int]:
        """Depth of a parameter for layer-wise learning rates.

        Args:
            param_name: name of the parameter.
            prefix: what stands before this module's names in it.

        Returns:
            The depth, and the number of depths: 0 is the stem with positions and class tokens, i + 1 block i counted
            through all stages (a stage's down-sampling belongs to its last block), the last the norms of the outputs
            and all that follows the backbone.
        """
        last = sum(self.depths) + 1
        name = param_name.removeprefix(prefix) if param_name.startswith(prefix) else ''
        first, *parts = name.split('.')
        if first == 'patch_embed' or name in self.stem_parameters():
            return 0, last + 1
        if first != self.BLOCKS:
            return last, last + 1
        stage = int(parts[0])
        if parts[1] == 'blocks':
            return sum(self.depths[:stage]) + int(parts[2]) + 1, last + 1
        return sum(self.depths[: stage + 1]), last + 1


def run_block(block: nn.Module, with_cp: bool, x: Tensor, *inputs: object) -> Any:
    """Result of a block, which is computed again in the backward pass if ``with_cp``."""
    if not (with_cp and torch.is_grad_enabled() and x.requires_grad):
        return block(x, *inputs)
    options: dict[str, Any] = {}
    if not torch.compiler.is_compiling():  # which recomputes the operations alone, and takes no such context
        options['context_fn'] = lambda: (nullcontext(), _statistics_kept(block))
    return checkpoint(block, x, *inputs, use_reentrant=False, **options)


@contextmanager
def _statistics_kept(block: nn.Module) -> Iterator[None]:
    """Within it BatchNorm does not count a batch again that it has seen."""
    norms = [(m, m.momentum, m.num_batches_tracked) for m in block.modules() if isinstance(m, _BatchNorm)]
    for norm, _, count in norms:
        norm.momentum, norm.num_batches_tracked = 0.0, None if count is None else count.clone()
    try:
        yield
    finally:
        for norm, momentum, count in norms:
            norm.momentum, norm.num_batches_tracked = momentum, count


class Stage(nn.Module):
    """Blocks of one resolution, and what leads to the next.

    Args:
        blocks: the blocks.
        downsample: what leads to the next stage; None behind the last that is built.
        with_cp: gradient checkpointing, one checkpoint a block.
    """

    def __init__(self, blocks: Iterable[nn.Module], downsample: nn.Module | None, with_cp: bool) -> None:
        super().__init__()
        self.blocks = nn.ModuleList(blocks)
        if downsample is not None:
            self.downsample = downsample
        self.with_cp = with_cp

    def forward(self, x: Tensor, *inputs: object) -> Tensor:
        """Features -> features of the same shape, not down-sampled."""
        for block in self.blocks:
            x = run_block(block, self.with_cp, x, *inputs)
        return x


class HierarchicalBackbone(Backbone):
    """Base of backbones of four stages, each with half the sides and twice the channels of the one before it.

    Args:
        arguments: see `Backbone`; ``out_indices`` may be None: all stages, or the last for 'avg_featmap'.
        stride: stride of the stem, pixels.
    """

    STAGE = 'stage'  # what messages call one

    def __init__(self, arguments: Mapping[str, object], stride: int) -> None:
        super().__init__(arguments)
        self.depths = four_numbers('depths of arch', self.settings['depths'], self.STAGE)
        self.stride = stride
        self.out_indices = self._absolute_indices(arguments['out_indices'])

    def _absolute_indices(self, out_indices: int | Sequence[int] | None) -> tuple[int, ...]:
        last = len(self.depths) - 1
        if out_indices is None:
            return (last,) if self.out_type == 'avg_featmap' else tuple(range(last + 1))
        indices = self._rising_indices(out_indices)
        if self.out_type == 'avg_featmap' and indices != (last,):
            raise ValueError(
                f"out_type='avg_featmap' is of the last {self.STAGE}: set out_indices=({last},), not {out_indices}"
            )
        return indices

    @property
    def out_channels(self) -> tuple[int, ...]:
        """Channels of each output."""
        return tuple(self.embed_dims * 2**i for i in self.out_indices)

    @property
    def out_strides(self) -> tuple[int, ...]:
        """Stride of each output map, pixels."""
        return tuple(self.stride * 2**i for i in self.out_indices)

    def add_output_norms(self) -> None:
        """Add a LayerNorm over the channels of each output, ``outnorm0`` to ``outnorm3``."""
        for i, channels in zip(self.out_indices, self.out_channels, strict=True):
            self.add_module(f'outnorm{i}', LayerNorm2d(channels, eps=1e-5))


class PlainBackbone(Backbone):
    """Base of backbones of one row of blocks over patches with stored positions and class tokens.

    Args:
        arguments: see `Backbone`; with ``out_indices``, ``final_norm``, ``interpolate_mode`` and ``with_cp``.
        cls_layout: where class tokens stand, see `class_token_positions`.
    """

    def __init__(self, arguments: Mapping[str, object], cls_layout: str | None) -> None:
        super().__init__(arguments)
        self.depth = self.settings['depth']
        self.depths = (1,) * self.depth
        self.cls_layout = cls_layout
        final_norm = arguments['final_norm']
        self.final_norm = self.out_type != 'featmap' if final_norm is None else final_norm
        self.interpolate_mode = arguments['interpolate_mode']
        self.with_cp = arguments['with_cp']
        self.out_indices = self._absolute_indices(arguments['out_indices'])

    def _absolute_indices(self, out_indices: int | Sequence[int]) -> tuple[int, ...]:
        indices = self._rising_indices(out_indices)
        if self.final_norm and indices[-1] != self.depth - 1:
            raise ValueError(
                f'final_norm belongs to the last block, {self.depth - 1}, which out_indices {out_indices} leaves out: '
                'add it, or set final_norm=False'
            )
        return indices

    def add_embeddings(
        self, in_channels: int, img_size: int | Sequence[int], patch_size: int, patch_stride: int, drop_rate: float
    ) -> None:
        """Add the patch embedding, class tokens, and positions for the grid of ``img_size``."""
        self.patch_embed = PatchEmbed(in_channels, self.embed_dims, patch_size, patch_stride)
        self.grid = self.patch_embed.grid_size(*image_sides(img_size))
        names = class_token_names(self.cls_layout)
        for name in names:
            self.register_parameter(name, nn.Parameter(torch.zeros(1, 1, self.embed_dims)))
        num_tokens = self.grid[0] * self.grid[1] + len(names)
        self.pos_embed = nn.Parameter(torch.zeros(1, num_tokens, self.embed_dims))
        self.position_cache = PositionCache()
        self.drop_after_pos = nn.Dropout(drop_rate)

    def stem_parameters(self) -> tuple[str, ...]:
        """Positions and class tokens."""
        return ('pos_embed', *class_token_names(self.cls_layout))

    @property
    def out_channels(self) -> tuple[int, ...]:
        """Channels of each output."""
        return (self.embed_dims,) * len(self.out_indices)

    @property
    def out_strides(self) -> tuple[int, ...]:
        """Stride of each output map, pixels."""
        return (self.patch_embed.patch_stride,) * len(self.out_indices)

    def init_embeddings(self) -> None:
        """Initialise the patch embedding, positions and class tokens."""
        nn.init.zeros_(self.patch_embed.proj.bias)
        lecun_normal_(self.patch_embed.proj.weight)
        for name in self.stem_parameters():
            nn.init.trunc_normal_(getattr(self, name), std=0.02)

    def positions(self, grid: tuple[int, int]) -> Tensor:
        """Position table (1, L, D) of a grid (h, w) of patches, with the entries of the class tokens in place."""
        if surely_equal(grid, self.grid):
            return self.pos_embed
        return self.position_cache.get(self.pos_embed, tuple(grid), lambda: self._resized_positions(grid))

    def _resized_positions(self, grid: tuple[int, int]) -> Tensor:
        layout, table, count = self.cls_layout, self.pos_embed, self.grid[0] * self.grid[1]
        patches = resize_pos_embed(patch_tokens(layout, table, count), self.grid, grid, self.interpolate_mode)
        return insert_class_tokens(layout, patches, class_tokens(layout, table, count))

    def embed(self, x: Tensor) -> tuple[Tensor, tuple[int, int]]:
        """Image (B, channels, H, W) -> tokens (B, L, D) with positions, and the grid (h, w) of its patches."""
        patches, grid = self.patch_embed(x)
        names = class_token_names(self.cls_layout)
        tokens = [getattr(self, name).to(patches.dtype).expand(x.shape[0], -1, -1) for name in names]
        x = insert_class_tokens(self.cls_layout, patches, tokens) + self.positions(grid)
        return self.drop_after_pos(x), grid

    def read_out(self, x: Tensor, grid: tuple[int, int]) -> Tensor:
        """Tokens (B, L, D) of a grid (h, w) -> what ``out_type`` says."""
        if self.out_type == 'raw':
            return x
        if self.out_type == 'last_token':
            return x[:, -1]
        if self.out_type == 'cls_token':
            return torch.cat(class_tokens(self.cls_layout, x, grid[0] * grid[1]), dim=1).mean(dim=1)
        x = patch_tokens(self.cls_layout, x, grid[0] * grid[1])
        if self.out_type == 'avg_featmap':
            return x.mean(dim=1)
        return x.transpose(1, 2).unflatten(2, grid).contiguous()
