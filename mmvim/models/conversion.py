"""Steps of converting and recognising weights that several families of backbones share."""

import math
from collections.abc import Collection, Mapping, Sequence

from torch import Tensor, nn

from mmvim.errors import CheckpointError
from mmvim.models.layers.positions import resize_pos_embed, square_grid
from mmvim.weights.fitting import Conversion

# M patch tokens, D width

# norms that only dense backbones have
OUTPUT_NORMS = tuple(f'outnorm{i}.{leaf}' for i in range(4) for leaf in ('weight', 'bias'))


def drop_unbuilt_stages(
    state_dict: Mapping[str, Tensor], stages: str, built: int, norms: Collection[str]
) -> Conversion:
    """Weights of a backbone in four stages for one with other outputs; a classifier's `head` is always dropped.

    Args:
        state_dict: weights by name.
        stages: name of the list of stages.
        built: stages that the target has. Those behind them are dropped, and what leads to them.
        norms: norms behind stages that the target has; other `outnorm0` to `outnorm3` and `norm` are dropped.
    """
    unbuilt = (*(f'{stages}.{i}.' for i in range(built, 4)), f'{stages}.{built - 1}.downsample.')

    def is_dropped(name: str) -> bool:
        first = name.partition('.')[0]
        return first == 'head' or name.startswith(unbuilt) or (_is_output_norm(first) and first not in norms)

    return Conversion.without(state_dict, is_dropped)


def _is_output_norm(name: str) -> bool:
    return name == 'norm' or name.startswith('outnorm')


def convert_stages(backbone: nn.Module, weights: Mapping[str, Tensor], metadata: Mapping) -> Conversion:
    """`Family.convert` of backbones in four stages."""
    norms = {name for name, _ in backbone.named_children() if _is_output_norm(name)}
    blocks = str(backbone.BLOCKS)
    built = len(getattr(backbone, blocks))
    return drop_unbuilt_stages(backbone.WEIGHTS.rename(weights), blocks, built, norms)


def stage_outputs(weights: Mapping[str, Tensor], depths: Sequence[int]) -> dict:
    """Arguments by which a backbone in four stages of these depths, 0 if not built, has the outputs of a file."""
    last = max(i for i, depth in enumerate(depths) if depth)
    maps = tuple(i for i in range(4) if f'outnorm{i}.weight' in weights)
    if 'norm.weight' in weights:
        return dict(out_type='avg_featmap', out_indices=(last,))
    return dict(out_type='featmap' if maps else 'raw', out_indices=tuple(sorted({*maps, last})))


def count_blocks(state_dict: Mapping[str, Tensor], stages: str) -> tuple[int, ...]:
    """Blocks of each of four stages."""
    parts = {tuple(name.split('.')[:4]) for name in state_dict}
    return tuple(sum(part[:3] == (stages, str(i), 'blocks') for part in parts) for i in range(4))


def drop_unbuilt_blocks(
    state_dict: Mapping[str, Tensor], blocks: str, depth: int | None, built: int | None, unwanted: Sequence[str]
) -> Conversion:
    """Weights of a backbone of one row of blocks for one with other outputs.

    Args:
        state_dict: weights by name.
        blocks: name of the list of blocks.
        depth: blocks of the target's architecture.
        built: blocks that the target has built. Of a file of this depth those beyond are dropped.
        unwanted: beginnings of the names of other weights that are dropped.
    """
    unbuilt = built if built is not None and count_layers(state_dict, blocks) == depth else math.inf

    def is_dropped(name: str) -> bool:
        first, _, rest = name.partition('.')
        return name.startswith(tuple(unwanted)) or (first == blocks and int(rest.partition('.')[0]) >= unbuilt)

    return Conversion.without(state_dict, is_dropped)


def count_layers(state_dict: Mapping[str, Tensor], blocks: str) -> int:
    """Blocks in the weights of a backbone of one row of blocks."""
    return len({name.split('.')[1] for name in state_dict if name.startswith(f'{blocks}.')})


def scan_directions(state_dict: Mapping[str, Tensor], mixer: str) -> str | None:
    """The argument `directions` of a mixer with weights for both; None if it has those of one.

    Args:
        state_dict: weights by name.
        mixer: beginning of the names of the mixer's weights.
    """
    if f'{mixer}A_b_log' not in state_dict:
        return None
    return 'v2' if f'{mixer}conv1d_b.weight' in state_dict else 'v1'


def grid_of(num_patches: int, target: tuple[int, int]) -> tuple[int, int] | None:
    """Grid of a table of positions: square, or else the target's; None if it is neither."""
    return square_grid(num_patches) or ((target[0], target[1]) if num_patches == target[0] * target[1] else None)


def square_grid_of(weights: Mapping[str, Tensor], tokens: int, family: str) -> tuple[int, int]:
    """Grid of a square position table behind its class tokens; that of 224 pixels if there is no table.

    Raises:
        CheckpointError: if it is no square.
    """
    table = weights.get('pos_embed')
    if table is None:
        return 14, 14
    length = table.shape[1]
    # detectron2 keeps the table's entry of a class token that it has not
    grid = square_grid(length - tokens) or (square_grid(length - 1) if not tokens else None)
    if grid is None:
        raise CheckpointError(
            f'this is a {family} checkpoint whose pos_embed has {length - tokens} patch positions, which is no square '
            'grid: name the config that it was trained with, --config CONFIG'
        )
    return grid


def resize_positions(
    result: Conversion, patches: Tensor, source: tuple[int, int], target: tuple[int, int], mode: str
) -> Tensor:
    """Interpolate positions (1, M, D) of patches to another grid (h, w), and note it in the result."""
    if tuple(source) != tuple(target):
        result.interpolated.append(f'pos_embed from {source[0]}x{source[1]} to {target[0]}x{target[1]}')
    return resize_pos_embed(patches, source, target, mode)
