"""Published Vim weights (hustvl/Vim) and our own, fitted to a VisionMamba of another size, grid or read-out."""

import re
from collections import OrderedDict
from collections.abc import Mapping

import torch
from torch import Tensor, nn

from mmvim.checkpoints.fitting import Conversion, convert_on_load
from mmvim.checkpoints.reading import MODEL_NAME
from mmvim.checkpoints.settings import METADATA, HiddenSetting, both_classify, differing, same_output
from mmvim.errors import CheckpointError

# M = h * w patch tokens, D width

ARCH_OF_WIDTH = {192: 'tiny', 384: 'small', 768: 'base'}
ROTARY = 'rope.'  # tables that the original code saves with a model that has rotary embedding, under `rope.freqs_*`


def _same_table(theirs: Mapping, ours: Mapping) -> bool:
    """At another grid the table of positions is interpolated, which the log tells."""
    return theirs.get('grid') == ours['grid']


def _same_token(theirs: Mapping, ours: Mapping) -> bool:
    """A dense backbone leaves the class tokens of a classifier out on purpose; another number of them is refused."""
    return same_output(theirs, ours) or ours['cls_token'] is not None


def _both_rotary(theirs: Mapping, ours: Mapping) -> bool:
    return None not in (theirs.get('rotary'), ours['rotary'])


# What neither names nor shapes of a Vim's weights tell. Not in it, as they change no results of given weights: rates,
# `reverse_prob`, `frozen_stages`, `with_cp`, `scan_backend`. All other arguments show in shapes.
HIDDEN_SETTINGS = (
    HiddenSetting('directions', 'blocks run in other directions', refused=True),
    HiddenSetting('divide_output', 'the sum of both directions is halved in one of them only', refused=True),
    # the released COCO and ADE20K recipes train on with rotary embedding
    HiddenSetting('rotary', 'tokens are turned by other angles than in training'),
    HiddenSetting('rotary_pretrain_size', 'tokens are turned by other angles than in training', counts=_both_rotary),
    HiddenSetting('cls_token', 'the class token stands elsewhere in the sequence', counts=_same_token),
    # long-sequence fine-tuning goes from 16 to 8 pixels, with another table
    HiddenSetting('patch_stride', 'a table of as many positions spans another image', counts=_same_table),
    HiddenSetting('out_type', 'the classifier sees other features', counts=both_classify),
    HiddenSetting('out_indices', 'other blocks are read', counts=same_output),
    HiddenSetting('feature_source', 'other features are read', counts=same_output),
    HiddenSetting('final_norm', 'features pass the final norm in one of them only', counts=same_output),
    HiddenSetting('norm_eps', 'norms divide by slightly other numbers'),
    HiddenSetting('interpolate_mode', 'positions are interpolated otherwise at other image sizes', counts=same_output),
)

# Names by which hustvl/Vim builds its models, `args.model` of a published file. `with_cls_token` is that of the first
# release, at the head.
MODEL_NAMES = re.compile(
    r'vim_[a-z]+_patch(?P<patch>\d+)(_stride(?P<stride>\d+))?_\d+_bimambav2_final_pool_(?P<pool>mean|none)_abs_pos_embed'
    r'(?P<rotary>_rope(_also_residual)?)?(_with_(?P<token>cls_token|midclstok|middle_cls_token|noclstok))?(?P<half>_div2)?'
)
TOKENS = {None: None, 'noclstok': None, 'cls_token': 'head', 'midclstok': 'middle', 'middle_cls_token': 'middle'}


def settings_of_name(name: str | None) -> dict | None:
    """Arguments of VisionMamba by the name under which hustvl/Vim builds a model; None for any other name.

    Args:
        name: `args.model` of a published file, if it has one.
    """
    found = MODEL_NAMES.fullmatch(name or '')
    if found is None:
        return None
    token = TOKENS[found['token']]
    pooled = {'mean': 'avg_featmap', 'none': 'last_token'}[found['pool']]
    return {
        'directions': 'v2',
        'divide_output': found['half'] is not None,
        'rotary': {None: None, '_rope': 'hidden', '_rope_also_residual': 'both'}[found['rotary']],
        'cls_token': token,
        'patch_stride': int(found['stride'] or found['patch']),
        'out_type': pooled if token is None else 'cls_token',
        'feature_source': 'residual',
        'final_norm': True,
        'norm_eps': 1e-5,
    }


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
    drop = {name for name in state_dict if name.startswith(('head.', ROTARY))}
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

    Its own weights carry grid, class-token layout and all of `HIDDEN_SETTINGS` as metadata of the state dict, so that
    non-square grids and class tokens at the head are known again. Settings of a published file are known from its
    `args.model` and from its rotary tables, see `rotary_in`. See `convert_on_load` for what is raised and warned of.

    Args:
        backbone: a VisionMamba.
    """
    backbone._register_state_dict_hook(_after_save)
    convert_on_load(backbone, _convert, _explain, _differ)


def vim_hidden_settings(backbone: nn.Module) -> dict:
    """Values of a VisionMamba's `HIDDEN_SETTINGS`, and its grid (h, w) of patches."""
    settings = {
        'grid': tuple(backbone.grid),
        # in training, 'sequence' is 'none' with half of the batches backwards
        'directions': 'none' if backbone.directions == 'sequence' else backbone.directions,
        'rotary': backbone.rotary_mode,
        'cls_token': backbone.cls_layout,
        'patch_stride': backbone.patch_embed.patch_stride,
        'out_type': backbone.out_type,
        'out_indices': backbone.out_indices,
        'feature_source': backbone.feature_source,
        'final_norm': backbone.final_norm,
        'interpolate_mode': backbone.interpolate_mode,
    }
    if backbone.rotary is not None:
        settings['rotary_pretrain_size'] = backbone.rotary.pretrain_size
    if len(backbone.layers):
        first = backbone.layers[0]
        settings['norm_eps'] = first.norm.eps
        if backbone.directions == 'v2':
            settings['divide_output'] = first.mixer.scale == 0.5
    return settings


def _after_save(backbone, state_dict, prefix, local_metadata) -> None:
    local_metadata[METADATA] = vim_hidden_settings(backbone)


def _convert(backbone, weights: Mapping[str, Tensor], metadata: Mapping) -> Conversion:
    saved = metadata.get(METADATA) or settings_of_name(metadata.get(MODEL_NAME)) or {}
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


def _differ(backbone, weights: Mapping[str, Tensor], metadata: Mapping) -> tuple[list[str], list[str]]:
    # the backbone imports this module
    from mmvim.models.layers.patch_embed import square_grid

    ours = vim_hidden_settings(backbone)
    if METADATA in metadata:
        return differing(HIDDEN_SETTINGS, metadata[METADATA], ours)
    if not vim_settings(weights):
        return [], []
    name = metadata.get(MODEL_NAME)
    named = settings_of_name(name)
    theirs, evidence = dict(named or {}), dict.fromkeys(named or {}, 'by its args.model')
    told = rotary_in(weights, named, ours['rotary'])
    if told is not None:
        theirs['rotary'], evidence['rotary'] = told
    table = weights.get('pos_embed')
    if table is not None:
        theirs['grid'] = square_grid(table.shape[1] - len(class_token_names(saved_class_tokens(weights))))
    refused, warned = differing(HIDDEN_SETTINGS, theirs, ours, evidence)
    if name is not None and named is None:
        warned.append(
            f'args.model={name!r} of the file is no name of the original code, which leaves its class token, rotary '
            'embedding and divide_output unknown: compare them'
        )
    elif told is None and ours['rotary'] is not None:
        warned.append(
            'the file does not tell whether it was trained with rotary embedding, and the model has '
            f'rotary={ours["rotary"]!r}: compare it'
        )
    return [], refused + warned  # what a name tells may be wrong


def rotary_in(
    weights: Mapping[str, Tensor], named: Mapping | None, mode: str | None = None
) -> tuple[str | None, str] | None:
    """The argument `rotary` of a file without the metadata of this package, and by what it is known.

    The original code saves its tables, but a VisionMamba does not: only in a published classifier, which has its name
    or its `head` and class token, do missing ones tell that there is no rotary embedding.

    Args:
        weights: weights by published name.
        named: what the file's `args.model` tells, see `settings_of_name`.
        mode: what tables are taken for where no name tells 'hidden' from 'both'; None means 'both'.

    Returns:
        The value and the evidence in words; None if the file does not tell.
    """
    by_name = (named or {}).get('rotary')
    if any(name.startswith(ROTARY) for name in weights):
        return by_name or mode or 'both', f'it has {ROTARY}freqs_cos'
    if by_name is not None:
        return by_name, 'by its args.model'
    if named is not None or ('head.weight' in weights and saved_class_tokens(weights) is not None):
        return None, f'it has no {ROTARY}freqs_cos'
    return None
