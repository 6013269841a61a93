"""Published DeiT weights and our own, fitted to a VisionTransformer of another grid or read-out."""

import re
from collections import OrderedDict
from collections.abc import Mapping

import torch
from torch import Tensor, nn

from mmvim.errors import CheckpointError
from mmvim.models.conversion import (
    count_layers,
    drop_unbuilt_blocks,
    grid_of,
    resize_positions,
    square_grid_of,
)
from mmvim.models.layers.positions import square_grid
from mmvim.weights.classifier import published_head
from mmvim.weights.family import Family, Identity, Known
from mmvim.weights.fitting import Conversion
from mmvim.weights.settings import (
    METADATA,
    HiddenSetting,
    Values,
    arguments,
    both_classify,
    same_output,
    saved_values,
)

# D width

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
    weights = timm_names(state_dict)
    unwanted = (*NOT_BACKBONE, 'dist_token', *(() if with_cls_token else ('cls_token',)))
    unwanted += () if final_norm else ('norm.',)
    result = drop_unbuilt_blocks(weights, 'blocks', depth, num_blocks, unwanted)
    table = weights.get('pos_embed')
    if table is None or table.ndim != 3:
        return result
    tokens, source_grid = _layout(weights, table, grid_size, source_grid)
    kept = min(tokens, int(with_cls_token))
    result.dropped += [f'pos_embed[{i}]' for i in range(kept, tokens)]
    if tuple(source_grid) != tuple(grid_size) or kept != tokens:
        patches = resize_positions(result, table[:, tokens:], source_grid, grid_size, mode)
        result.state_dict['pos_embed'] = torch.cat((table[:, :kept], patches), dim=1)
    return result


def _layout(
    weights: Mapping[str, Tensor], table: Tensor, target: tuple[int, int], grid: tuple[int, int] | None
) -> tuple[int, tuple[int, int]]:
    """Entries before those of patches in a position table, and the grid of the patches."""
    tokens = sum(name in weights for name in PREFIX_TOKENS)
    if grid is not None:
        tokens = table.shape[1] - grid[0] * grid[1]
    elif not tokens and square_grid(table.shape[1]) is None and square_grid(table.shape[1] - 1) is not None:
        tokens = 1  # detectron2 keeps the table's entry of a class token that it has not
    num_patches = table.shape[1] - tokens
    grid = grid or grid_of(num_patches, target)
    if grid is None or not 0 <= tokens <= len(PREFIX_TOKENS):
        raise CheckpointError(
            f'pos_embed has {num_patches} patch positions, which is no square grid: build the model with the img_size '
            'that the checkpoint was trained with'
        )
    return tokens, grid


def _read(weights: Mapping[str, Tensor], backbone: nn.Module | None = None) -> dict:
    """Arguments of VisionTransformer that weights show; empty if they are no plain vision transformer's."""
    patch = weights.get('patch_embed.proj.weight')
    if patch is None or 'blocks.0.attn.qkv.weight' not in weights:
        return {}
    return {
        'embed_dims': patch.shape[0],
        'depth': count_layers(weights, 'blocks'),
        'patch_size': patch.shape[-1],
        'in_channels': patch.shape[1],
    }


def _known(backbone: nn.Module, weights: Mapping[str, Tensor], metadata: Mapping, ours: Values) -> Known:
    width = _read(timm_names(weights)).get('embed_dims')
    arch = next((arch for arch in backbone.arch_zoo.values() if arch['embed_dims'] == width), None)
    if arch is None:
        return Known()
    values = {'num_heads': arch['num_heads']}
    if published_head(weights, metadata):
        values['norm_eps'] = 1e-6
        if 'cls_token' in weights:
            values |= {'out_type': 'cls_token', 'with_cls_token': True}
    return Known(values, dict.fromkeys(values, 'as in all published ones'))


def _convert(backbone: nn.Module, weights: Mapping[str, Tensor], metadata: Mapping) -> Conversion:
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


def _recognise(file: Mapping[str, Tensor], arch_zoo: Mapping[str, Mapping]) -> Identity | None:
    weights, saved = timm_names(file), saved_values(file)
    found = _read(weights)
    if not found:
        return None
    width, depth, patch = found['embed_dims'], found['depth'], found['patch_size']
    tokens = [name for name in PREFIX_TOKENS if name in weights]
    grid = saved.get('grid') or square_grid_of(weights, len(tokens), 'DeiT')
    image_size = grid[0] * patch, grid[1] * patch
    arch = dict(embed_dims=width, depth=depth, num_heads=saved.get('num_heads', max(width // 64, 1)))
    size = next((name for name, a in reversed(list(arch_zoo.items())) if a == arch), None)
    final_norm = 'norm.weight' in weights
    distilled = 'dist_token' in tokens
    backbone = dict(
        type='mmvim.VisionTransformer',
        arch=size or arch,
        img_size=image_size,
        **WEIGHTS.arguments(found),
        with_cls_token='cls_token' in tokens,
        out_type='cls_token' if final_norm and tokens and not distilled else 'featmap',
        final_norm=final_norm,
    )
    backbone |= arguments(saved, HIDDEN_SETTINGS)
    facts = [
        f'{depth} blocks of width {width}',
        f'patches of {patch} pixels',
        f'positions for a grid of {grid[0]}x{grid[1]}',
        'class and distillation token' if distilled else 'class token at the head' if tokens else 'no class token',
    ]
    notes = []
    if distilled:
        notes.append(
            'a distilled DeiT classifies by two tokens, which this package does not: for dense prediction only'
        )
    if not size and 'num_heads' not in saved:
        notes.append(f'the file does not tell the number of heads: {arch["num_heads"]}, 64 channels each')
    return Identity('DeiT', size, backbone, image_size, facts, notes)


WEIGHTS = Family(
    name='DeiT',
    read=_read,
    convert=_convert,
    hidden=HIDDEN_SETTINGS,
    recognise=_recognise,
    known=_known,
    rename=timm_names,
    arch=dict(embed_dims=None, depth=None),
    lacking={
        'cls_token': 'the file lacks a class token: set with_cls_token=False',
        'norm.weight': 'the file lacks the final norm: set final_norm=False',
    },
    foreign={
        '.rel_pos_': 'the file has relative positions, which this model has not: give one that was trained without'
    },
)
