"""Published Vim weights (hustvl/Vim) and our own, fitted to a VisionMamba of another size, grid or read-out."""

from collections import OrderedDict
from collections.abc import Mapping

import torch
from torch import Tensor, nn

from mmvim.checkpoints.fitting import METADATA, Conversion, convert_on_load
from mmvim.errors import CheckpointError

# M = h * w patch tokens, D width

ARCH_OF_WIDTH = {192: 'tiny', 384: 'small', 768: 'base'}


def class_token_names(layout: str | None) -> tuple[str, ...]:
    """Parameters of the class tokens of a layout: 'middle', 'head', 'double' or None."""
    return {None: (), 'double': ('cls_token_head', 'cls_token_tail')}.get(layout, ('cls_token',))


def saved_class_tokens(state_dict: Mapping[str, Tensor], single: str = 'middle') -> str | None:
    """Layout of the class tokens in a file. A single one does not show where it stands; published ones: 'middle'."""
    if 'cls_token_head' in state_dict:
        return 'double'
    return single if 'cls_token' in state_dict else None


def vim_state_dict(
    state_dict: Mapping[str, Tensor],
    *,
    cls_token: str | None,
    grid_size: tuple[int, int],
    depth: int | None = None,
    num_layers: int | None = None,
    final_norm: bool = True,
    mode: str = 'bicubic',
    source_cls_token: str | None = None,
    source_grid: tuple[int, int] | None = None,
) -> Conversion:
    """Convert the weights of a Vim to those of one with other class tokens and another grid of patches.

    A position table has an entry per token in their order, class tokens included. Those of class tokens are taken out
    from where they stand, the rest is interpolated (corners not aligned, no antialiasing), and they are put back
    where the target has class tokens.

    Args:
        state_dict: weights by published name; `pos_embed` (1, M + class tokens, D).
        cls_token: layout of the target, 'middle', 'head', 'double' or None.
        grid_size: grid (h, w) of the target, patches.
        depth: blocks of the target's architecture. Blocks that a file of this depth has beyond `num_layers` are
            dropped.
        num_layers: blocks that the target has built.
        final_norm: whether the target has `norm_f`.
        mode: interpolation of torch.nn.functional.interpolate.
        source_cls_token: where a single class token of the file stands; None means as in the target if that has a
            single one, else 'middle', where published files have it.
        source_grid: grid (h, w) of the file; None means square, or the target's grid if the table is no square.

    Returns:
        The weights, the names dropped and what was interpolated.

    Raises:
        CheckpointError: if the position table fits no grid.
    """
    # the backbone imports this module
    from mmvim.models.backbones.vision_mamba import class_token_positions
    from mmvim.models.layers.patch_embed import resize_pos_embed, square_grid

    single = source_cls_token or (cls_token if cls_token in ('middle', 'head') else 'middle')
    saved = saved_class_tokens(state_dict, single)
    drop = {name for name in state_dict if name.startswith('head.')}
    if not final_norm:
        drop |= {name for name in state_dict if name.startswith('norm_f.')}
    if depth is not None and num_layers is not None and num_blocks(state_dict) == depth:
        drop |= {name for name in state_dict if name.startswith('layers.') and int(name.split('.')[1]) >= num_layers}
    if cls_token is None:
        drop |= set(class_token_names(saved))
    converted = OrderedDict((name, value) for name, value in state_dict.items() if name not in drop)
    result = Conversion(converted, dropped=[name for name in state_dict if name in drop])
    table = state_dict.get('pos_embed')
    if table is None or table.ndim != 3:
        return result

    num_patches = table.shape[1] - len(class_token_names(saved))
    if source_grid is None:
        source_grid = square_grid(num_patches)
        if source_grid is None and num_patches == grid_size[0] * grid_size[1]:
            source_grid = tuple(grid_size)
    if source_grid is None or source_grid[0] * source_grid[1] != num_patches:
        reason = 'which is no square grid' if source_grid is None else f'which is not the grid {tuple(source_grid)}'
        raise CheckpointError(
            f'pos_embed has {num_patches} patch positions, {reason}: build the model with the img_size, patch_stride '
            'and cls_token that the checkpoint was trained with'
        )
    places = class_token_positions(saved, num_patches)
    target_places = class_token_positions(cls_token, grid_size[0] * grid_size[1])
    if tuple(source_grid) == tuple(grid_size) and places == target_places:
        return result

    tokens = [table[:, place : place + 1] for place in places]
    if len(places) > len(target_places):
        result.dropped += [f'pos_embed[{place}]' for place in places]
    if len(places) != len(target_places):  # if any are wanted, the file lacks the class tokens too, which is refused
        tokens = [table.new_zeros(1, 1, table.shape[2])] * len(target_places)
    is_patch = torch.ones(table.shape[1], dtype=torch.bool)
    is_patch[list(places)] = False
    patches = resize_pos_embed(table[:, is_patch], source_grid, grid_size, mode)
    if tuple(source_grid) != tuple(grid_size):
        result.interpolated.append(f'pos_embed from {source_grid[0]}x{source_grid[1]} to {grid_size[0]}x{grid_size[1]}')
    for place, token in zip(target_places, tokens, strict=True):
        patches = torch.cat([patches[:, :place], token, patches[:, place:]], dim=1)
    converted['pos_embed'] = patches
    return result


def num_blocks(state_dict: Mapping[str, Tensor]) -> int:
    """Blocks in a Vim's weights."""
    return len({name.split('.')[1] for name in state_dict if name.startswith('layers.')})


def vim_settings(state_dict: Mapping[str, Tensor]) -> dict:
    """Arguments of VisionMamba that can be read from weights; empty if they are no Vim's."""
    patch, a_log = state_dict.get('patch_embed.proj.weight'), state_dict.get('layers.0.mixer.A_log')
    if patch is None or a_log is None:
        return {}
    first = 'layers.0.mixer.'
    directions = "'none', 'block' or 'sequence'"
    if first + 'A_b_log' in state_dict:
        directions = "'v2'" if first + 'conv1d_b.weight' in state_dict else "'v1'"
    return {
        'embed_dims': patch.shape[0],
        'depth': num_blocks(state_dict),
        'patch_size': patch.shape[-1],
        'in_channels': patch.shape[1],
        'd_state': a_log.shape[1],
        'directions': directions,
        'class tokens': {None: 'none', 'double': 'double'}.get(saved_class_tokens(state_dict), 'one'),
        'layer scale': 'yes' if first + 'gamma' in state_dict else 'no',
    }


def explain_vim(file: Mapping[str, Tensor], model: Mapping[str, Tensor], depth: int | None = None) -> list[str]:
    """Why the weights of a file do not fit a VisionMamba, one sentence a cause, with the remedy.

    Args:
        file: weights in the file, by published name.
        model: state dict of the model.
        depth: blocks of the model's architecture, where it has not built them all.
    """
    theirs, ours = vim_settings(file), vim_settings(model)
    if not theirs:
        return [
            f'this is no Vim checkpoint, it holds {", ".join(list(file)[:3])}, ...: give one that belongs to this model'
        ]
    if depth is not None:
        ours['depth'] = depth
    if ours['class tokens'] == 'none':  # those of the file are dropped
        theirs.pop('class tokens')
    remedies = {
        'embed_dims': f'set arch={ARCH_OF_WIDTH.get(theirs["embed_dims"])!r}'
        if theirs['embed_dims'] in ARCH_OF_WIDTH
        else '',
        'class tokens': {'none': 'set cls_token=None', 'double': "set cls_token='double'"}.get(
            theirs.get('class tokens'), "set cls_token='middle'"
        ),
        'layer scale': 'set layer_scale_init' + ('' if theirs['layer scale'] == 'yes' else '=None'),
    }
    return [
        f'the file has {name} {value}, the model {ours[name]}: {remedies.get(name) or f"set {name}={value}"}'
        for name, value in theirs.items()
        if value != ours[name]
    ]


def load_published_vim(backbone: nn.Module) -> None:
    """Let a VisionMamba load published weights, and its own at another image size, in every way to load.

    Its own weights carry grid and class-token layout as metadata of the state dict, so that non-square grids and class
    tokens at the head are known again. See `convert_on_load` for what is raised.

    Args:
        backbone: a VisionMamba; its cls_layout, grid, depth, layers, final_norm and interpolate_mode are read.
    """
    backbone._register_state_dict_hook(_after_save)
    convert_on_load(backbone, _convert, _explain)


def _after_save(backbone, state_dict, prefix, local_metadata) -> None:
    local_metadata[METADATA] = {'grid': tuple(backbone.grid), 'cls_token': backbone.cls_layout}


def _convert(backbone, weights: Mapping[str, Tensor], metadata: Mapping) -> Conversion:
    saved = metadata.get(METADATA, {})
    return vim_state_dict(
        weights,
        cls_token=backbone.cls_layout,
        grid_size=backbone.grid,
        depth=backbone.depth,
        num_layers=len(backbone.layers),
        final_norm=backbone.final_norm,
        mode=backbone.interpolate_mode,
        source_cls_token=saved.get('cls_token'),
        source_grid=saved.get('grid'),
    )


def _explain(backbone, weights: Mapping[str, Tensor]) -> list[str]:
    return explain_vim(weights, backbone.state_dict(), backbone.depth)
