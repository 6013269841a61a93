"""Published DeiT weights and our own, fitted to a VisionTransformer of another grid or read-out."""

import re
from collections import OrderedDict
from collections.abc import Mapping

import torch
from torch import Tensor, nn

from mmvim.checkpoints.classifier import published_head
from mmvim.checkpoints.fitting import Conversion, abridge, convert_on_load
from mmvim.checkpoints.settings import METADATA, HiddenSetting, both_classify, differing, same_output
from mmvim.errors import CheckpointError

# D width

ARCH_OF_WIDTH = {192: 'deit-tiny', 384: 'deit-small', 768: 'deit-base'}
PREFIX_TOKENS = ('cls_token', 'dist_token')
NOT_BACKBONE = ('head.', 'head_dist.', 'simfp_', 'pre_logits.', 'fc_norm.')

# What neither names nor shapes of a VisionTransformer's weights tell. Not in it, as they change no results of given
# weights: rates, `attention`, `frozen_stages`, `with_cp`. All other arguments show.
HIDDEN_SETTINGS = (
    HiddenSetting('num_heads', 'attention splits its channels otherwise', refused=True, in_arch=True),
    # a classifier's weights are meant to be trained on with windows
    HiddenSetting('window_size', 'attention sees other windows', counts=same_output),
    HiddenSetting('global_attn_indexes', 'other blocks have global attention', counts=same_output),
    HiddenSetting('with_cls_token', 'a class token takes part in attention in one of them only', counts=same_output),
    HiddenSetting('out_type', 'the classifier sees other features', counts=both_classify),
    HiddenSetting('out_indices', 'other blocks are read', counts=same_output),
    HiddenSetting('final_norm', 'features pass the final norm in one of them only', counts=same_output),
    HiddenSetting('norm_eps', 'norms divide by slightly other numbers'),
    HiddenSetting('interpolate_mode', 'positions are interpolated otherwise at other image sizes', counts=same_output),
)

# Files of facebookresearch/deit and of timm have our names already. In order: detectron2's ViTDet, whose backbone is
# the `net` of a pyramid; MMPretrain's VisionTransformer.
RENAMES = (
    (r'^net\.', ''),
    (r'^patch_embed\.projection\.', 'patch_embed.proj.'),
    (r'^ln1\.', 'norm.'),
    (r'^layers\.(\d+)\.ln([12])\.', r'blocks.\1.norm\2.'),
    (r'^layers\.(\d+)\.ffn\.layers\.0\.0\.', r'blocks.\1.mlp.fc1.'),
    (r'^layers\.(\d+)\.ffn\.layers\.1\.', r'blocks.\1.mlp.fc2.'),
    (r'^layers\.(\d+)\.attn\.', r'blocks.\1.attn.'),
)


def timm_names(state_dict: Mapping[str, Tensor]) -> OrderedDict[str, Tensor]:
    """Weights of a plain vision transformer under timm's names, which are those of facebookresearch/deit too."""
    renamed = OrderedDict()
    for name, value in state_dict.items():
        for pattern, replacement in RENAMES:
            name = re.sub(pattern, replacement, name, count=1)
        renamed[name] = value
    return renamed


def deit_state_dict(
    state_dict: Mapping[str, Tensor],
    *,
    with_cls_token: bool,
    grid_size: tuple[int, int],
    depth: int | None = None,
    num_blocks: int | None = None,
    final_norm: bool = True,
    mode: str = 'bicubic',
    source_grid: tuple[int, int] | None = None,
) -> Conversion:
    """Convert the weights of a plain vision transformer to those of one with another read-out and grid of patches.

    A position table has the entries of class and distillation token first. Those that the target lacks are dropped,
    the rest is interpolated (corners not aligned, no antialiasing).

    Args:
        state_dict: weights by the name that timm, facebookresearch/deit, detectron2 or MMPretrain gives them;
            `pos_embed` (1, tokens, D).
        with_cls_token: whether the target has a class token.
        grid_size: grid (h, w) of the target, patches.
        depth: blocks of the target's architecture. Blocks that a file of this depth has beyond `num_blocks` are
            dropped.
        num_blocks: blocks that the target has built.
        final_norm: whether the target has `norm`.
        mode: interpolation of torch.nn.functional.interpolate.
        source_grid: grid (h, w) of the file; None means square, or the target's grid if the table is no square.

    Returns:
        The weights, the names dropped and what was interpolated.

    Raises:
        CheckpointError: if the position table fits no grid.
    """
    # the backbone imports this module
    from mmvim.models.layers.patch_embed import resize_pos_embed, square_grid

    weights = timm_names(state_dict)
    drop = {name for name in weights if name.startswith(NOT_BACKBONE)} | ({'dist_token'} & set(weights))
    if not with_cls_token:
        drop |= {'cls_token'} & set(weights)
    if not final_norm:
        drop |= {name for name in weights if name.startswith('norm.')}
    if num_blocks is not None and _num_blocks(weights) == depth:
        drop |= {name for name in weights if name.startswith('blocks.') and int(name.split('.')[1]) >= num_blocks}
    converted = OrderedDict((name, value) for name, value in weights.items() if name not in drop)
    result = Conversion(converted, dropped=[name for name in weights if name in drop])
    table = weights.get('pos_embed')
    if table is None or table.ndim != 3:
        return result

    tokens = sum(name in weights for name in PREFIX_TOKENS)
    if source_grid is not None:
        tokens = table.shape[1] - source_grid[0] * source_grid[1]
    elif not tokens and square_grid(table.shape[1]) is None and square_grid(table.shape[1] - 1) is not None:
        tokens = 1  # detectron2 keeps the table's entry of a class token that it has not
    num_patches = table.shape[1] - tokens
    source_grid = source_grid or square_grid(num_patches)
    if source_grid is None and num_patches == grid_size[0] * grid_size[1]:
        source_grid = tuple(grid_size)
    if source_grid is None or not 0 <= tokens <= len(PREFIX_TOKENS):
        raise CheckpointError(
            f'pos_embed has {num_patches} patch positions, which is no square grid: build the model with the img_size '
            'that the checkpoint was trained with'
        )
    kept = min(tokens, int(with_cls_token))
    result.dropped += [f'pos_embed[{i}]' for i in range(kept, tokens)]
    patches = resize_pos_embed(table[:, tokens:], source_grid, grid_size, mode)
    if tuple(source_grid) != tuple(grid_size):
        result.interpolated.append(f'pos_embed from {source_grid[0]}x{source_grid[1]} to {grid_size[0]}x{grid_size[1]}')
    elif kept == tokens:
        return result
    converted['pos_embed'] = torch.cat((table[:, :kept], patches), dim=1)
    return result


def _num_blocks(weights: Mapping[str, Tensor]) -> int:
    return len({name.split('.')[1] for name in weights if name.startswith('blocks.')})


def deit_settings(state_dict: Mapping[str, Tensor]) -> dict:
    """Arguments of VisionTransformer that can be read from weights; empty if they are no plain vision transformer's."""
    weights = timm_names(state_dict)
    patch = weights.get('patch_embed.proj.weight')
    if patch is None or 'blocks.0.attn.qkv.weight' not in weights:
        return {}
    return {
        'embed_dims': patch.shape[0],
        'depth': _num_blocks(weights),
        'patch_size': patch.shape[-1],
        'in_channels': patch.shape[1],
    }


def explain_deit(file: Mapping[str, Tensor], model: Mapping[str, Tensor], depth: int | None = None) -> list[str]:
    """Why the weights of a file do not fit a VisionTransformer, one sentence a cause, with the remedy.

    Args:
        file: weights in the file.
        model: state dict of the model.
        depth: blocks of the model's architecture, where it has not built them all.
    """
    theirs, ours = deit_settings(file), deit_settings(model)
    if not theirs:
        return [f'this is no DeiT checkpoint, it holds {abridge(file)}: give one that belongs to this model']
    if depth is not None:
        ours['depth'] = depth
    arch = ARCH_OF_WIDTH.get(theirs['embed_dims'])
    reasons = [
        f'the file has {name} {value}, the model {ours[name]}: set '
        + (f'arch={arch!r}' if name == 'embed_dims' and arch else f'{name}={value}')
        for name, value in theirs.items()
        if value != ours[name]
    ]
    if 'cls_token' in model and 'cls_token' not in file:
        reasons.append('the file lacks a class token: set with_cls_token=False')
    if 'norm.weight' in model and 'norm.weight' not in timm_names(file):
        reasons.append('the file lacks the final norm: set final_norm=False')
    if any('.rel_pos_' in name for name in file):
        reasons.append('the file has relative positions, which this model has not: give one that was trained without')
    return reasons


def load_published_deit(backbone: nn.Module) -> None:
    """Let a VisionTransformer load published weights, and its own at another image size, in every way to load.

    Its own weights carry the grid and `HIDDEN_SETTINGS` as metadata of the state dict, so that non-square grids are
    known again. See `convert_on_load` for what is raised and warned of.

    Args:
        backbone: a VisionTransformer.
    """
    backbone._register_state_dict_hook(_after_save)
    convert_on_load(backbone, _convert, _explain, _differ)


def deit_hidden_settings(backbone: nn.Module) -> dict:
    """Values of a VisionTransformer's `HIDDEN_SETTINGS`, and its grid (h, w) of patches."""
    first = backbone.blocks[0]
    return {
        'grid': tuple(backbone.grid),
        'num_heads': first.attn.num_heads,
        'window_size': backbone.window_size,
        'global_attn_indexes': backbone.global_attn_indexes if backbone.window_size else (),
        'with_cls_token': backbone.with_cls_token,
        'out_type': backbone.out_type,
        'out_indices': backbone.out_indices,
        'final_norm': backbone.final_norm,
        'interpolate_mode': backbone.interpolate_mode,
        'norm_eps': first.norm1.eps,
    }


def _after_save(backbone, state_dict, prefix, local_metadata) -> None:
    local_metadata[METADATA] = deit_hidden_settings(backbone)


def _differ(backbone, weights: Mapping[str, Tensor], metadata: Mapping) -> tuple[list[str], list[str]]:
    ours = deit_hidden_settings(backbone)
    if METADATA in metadata:
        return differing(HIDDEN_SETTINGS, metadata[METADATA], ours)
    arch = backbone.arch_zoo.get(ARCH_OF_WIDTH.get(deit_settings(weights).get('embed_dims')))
    theirs = {'num_heads': arch['num_heads']} if arch else {}
    if arch and published_head(weights, metadata):
        theirs['norm_eps'] = 1e-6
        if 'cls_token' in weights:
            theirs |= {'out_type': 'cls_token', 'with_cls_token': True}
    refused, warned = differing(HIDDEN_SETTINGS, theirs, ours, dict.fromkeys(theirs, 'as in all published ones'))
    return [], refused + warned


def _convert(backbone, weights: Mapping[str, Tensor], metadata: Mapping) -> Conversion:
    if 'dist_token' in weights and backbone.out_type == 'cls_token':
        raise CheckpointError(
            'the checkpoint is of a distilled DeiT, which classifies by two tokens; this model has one: give the file '
            'of a DeiT without distillation, or use the weights for dense prediction'
        )
    return deit_state_dict(
        weights,
        with_cls_token=backbone.with_cls_token,
        grid_size=backbone.grid,
        depth=backbone.depth,
        num_blocks=len(backbone.blocks),
        final_norm=backbone.final_norm,
        mode=backbone.interpolate_mode,
        source_grid=metadata.get(METADATA, {}).get('grid'),
    )


def _explain(backbone, weights: Mapping[str, Tensor]) -> list[str]:
    return explain_deit(weights, backbone.state_dict(), backbone.depth)
