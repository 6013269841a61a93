"""Published Vim weights (hustvl/Vim) and our own, fitted to a VisionMamba of another size, grid or read-out."""

import math
import re
from collections.abc import Mapping

from torch import Tensor, nn

from mmvim.errors import CheckpointError
from mmvim.models.conversion import (
    count_layers,
    drop_unbuilt_blocks,
    grid_of,
    resize_positions,
    scan_directions,
    square_grid_of,
)
from mmvim.models.layers.class_tokens import (
    class_token_names,
    class_token_positions,
    class_tokens,
    insert_class_tokens,
    patch_tokens,
)
from mmvim.models.layers.positions import square_grid
from mmvim.weights.family import Family, Identity, Known, Words
from mmvim.weights.fitting import Conversion
from mmvim.weights.reading import MODEL_NAME
from mmvim.weights.settings import (
    METADATA,
    HiddenSetting,
    Values,
    arguments,
    both_classify,
    file_metadata,
    same_output,
    saved_values,
)

# M = h * w patch tokens, D width

ROTARY = 'rope.'  # tables that the original code saves with a model that has rotary embedding, under `rope.freqs_*`
MIXER_WEIGHTS = ('A_log', 'conv1d.weight', 'dt_proj.weight')  # which show how a mixer was built
LONG_SEQUENCE = (27, 27)  # 224 pixels in patches of 16 every 8: published long-sequence Vim


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
    single = source_cls_token or (cls_token if cls_token in ('middle', 'head') else 'middle')
    saved = saved_class_tokens(state_dict, single)
    unwanted = ('head.', ROTARY, *(() if final_norm else ('norm_f.',)))
    unwanted += class_token_names(saved) if cls_token is None else ()
    result = drop_unbuilt_blocks(state_dict, 'layers', depth, num_layers, unwanted)
    table = state_dict.get('pos_embed')
    if table is None or table.ndim != 3:
        return result

    num_patches = table.shape[1] - len(class_token_names(saved))
    source_grid = source_grid or grid_of(num_patches, grid_size)
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
    tokens = class_tokens(saved, table, num_patches)
    if len(places) > len(target_places):
        result.dropped += [f'pos_embed[{place}]' for place in places]
    if len(places) != len(target_places):  # if any are wanted, the file lacks the class tokens too, which is refused
        tokens = [table.new_zeros(1, 1, table.shape[2])] * len(target_places)
    patches = resize_positions(result, patch_tokens(saved, table, num_patches), source_grid, grid_size, mode)
    result.state_dict['pos_embed'] = insert_class_tokens(cls_token, patches, tokens)
    return result


def _read(state_dict: Mapping[str, Tensor], backbone: nn.Module | None = None) -> dict:
    """Arguments of VisionMamba that can be read from weights; empty if they are no Vim's."""
    patch, a_log = state_dict.get('patch_embed.proj.weight'), state_dict.get('layers.0.mixer.A_log')
    if patch is None or a_log is None:
        return {}
    first = 'layers.0.mixer.'
    settings = {
        'embed_dims': patch.shape[0],
        'depth': count_layers(state_dict, 'layers'),
        'patch_size': patch.shape[-1],
        'in_channels': patch.shape[1],
        'd_state': a_log.shape[1],
        'directions': scan_directions(state_dict, first) or Words("'none', 'block' or 'sequence'"),
        'layer scale': Words('yes' if first + 'gamma' in state_dict else 'no'),
    }
    if backbone is None or backbone.cls_layout is not None:  # else those of the file are dropped
        count = len(class_token_names(saved_class_tokens(state_dict)))
        settings['class tokens'] = Words(('none', 'one', 'double')[count])
    return settings


def _values(backbone: nn.Module) -> dict:
    names = ('out_type', 'out_indices', 'feature_source', 'final_norm', 'interpolate_mode')
    settings = {
        'grid': tuple(backbone.grid),
        # in training, 'sequence' is 'none' with half of the batches backwards
        'directions': 'none' if backbone.directions == 'sequence' else backbone.directions,
        'rotary': backbone.rotary_mode,
        'cls_token': backbone.cls_layout,
        'patch_stride': backbone.patch_embed.patch_stride,
        **{name: getattr(backbone, name) for name in names},
    }
    if backbone.rotary is not None:
        settings['rotary_pretrain_size'] = backbone.rotary.pretrain_size
    if len(backbone.layers):
        first = backbone.layers[0]
        settings['norm_eps'] = first.norm.eps
        if backbone.directions == 'v2':
            settings['divide_output'] = first.mixer.scale == 0.5
    return settings


def _convert(backbone: nn.Module, weights: Mapping[str, Tensor], metadata: Mapping) -> Conversion:
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


def _known(backbone: nn.Module, weights: Mapping[str, Tensor], metadata: Mapping, ours: Values) -> Known:
    """What the name by which the original code built a model tells, and what its tables do."""
    if not _read(weights):
        return Known()
    name = metadata.get(MODEL_NAME)
    named = settings_of_name(name)
    known = Known(dict(named or {}), dict.fromkeys(named or {}, 'by its args.model'))
    told = rotary_in(weights, named, ours['rotary'])
    if told is not None:
        known.values['rotary'], known.evidence['rotary'] = told
    table = weights.get('pos_embed')
    if table is not None:
        known.values['grid'] = square_grid(table.shape[1] - len(class_token_names(saved_class_tokens(weights))))
    if name is not None and named is None:
        known.notes.append(
            f'args.model={name!r} of the file is no name of the original code, which leaves its class token, rotary '
            'embedding and divide_output unknown: compare them'
        )
    elif told is None and ours['rotary'] is not None:
        known.notes.append(
            'the file does not tell whether it was trained with rotary embedding, and the model has '
            f'rotary={ours["rotary"]!r}: compare it'
        )
    return known


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


def _mixer(weights: Mapping[str, Tensor], width: int) -> dict:
    """Entries of `arch` by which mixers are built."""
    shapes = {
        name: weights[f'layers.0.mixer.{name}'].shape for name in MIXER_WEIGHTS if f'layers.0.mixer.{name}' in weights
    }
    inner, d_state = shapes['A_log']
    return dict(
        d_state=d_state,
        d_conv=shapes['conv1d.weight'][-1] if 'conv1d.weight' in shapes else 4,
        expand=inner // width,
        dt_rank=shapes['dt_proj.weight'][-1] if 'dt_proj.weight' in shapes else math.ceil(width / 16),
    )


def _recognise(weights: Mapping[str, Tensor], arch_zoo: Mapping[str, Mapping]) -> Identity | None:
    found = _read(weights)
    if not found:
        return None
    width, depth, patch = found['embed_dims'], found['depth'], found['patch_size']
    mixer = _mixer(weights, width)
    usual = dict(d_state=16, d_conv=4, expand=2, dt_rank=math.ceil(width / 16))
    size = WEIGHTS.size_of(arch_zoo, found) if mixer == usual else None
    name, saved = file_metadata(weights).get(MODEL_NAME), saved_values(weights)
    named = settings_of_name(name)
    known = saved or named or {}
    layout = saved_class_tokens(weights, known.get('cls_token') or 'middle')
    grid = known.get('grid') or square_grid_of(weights, len(class_token_names(layout)), 'Vim')
    stride = known.get('patch_stride') or (patch // 2 if grid == LONG_SEQUENCE and patch == 16 else patch)
    image_size = tuple((n - 1) * stride + patch for n in grid)
    final_norm = 'norm_f.weight' in weights
    told = (saved['rotary'], 'as it was saved') if 'rotary' in saved else rotary_in(weights, named)
    backbone = dict(
        type='mmvim.VisionMamba',
        arch=size or dict(embed_dims=width, depth=depth, **mixer),
        img_size=image_size,
        patch_size=patch,
        patch_stride=stride,
        in_channels=found['in_channels'],
        cls_token=layout,
        directions='none' if isinstance(found['directions'], Words) else found['directions'],
        layer_scale_init=1.0 if found['layer scale'] == 'yes' else None,
        out_type='featmap' if not final_norm else 'cls_token' if layout else 'avg_featmap',
        final_norm=final_norm,
    )
    backbone |= arguments(known, HIDDEN_SETTINGS) | {'rotary': told and told[0]}
    facts = [
        f'{depth} blocks of width {width}',
        f'patches of {patch} pixels every {stride}',
        f'positions for a grid of {grid[0]}x{grid[1]}',
        {None: 'no class token', 'double': 'two class tokens'}.get(layout, f'class token: {layout}'),
        f'directions {found["directions"]!r}',
        f'rotary {backbone["rotary"]!r}',
    ]
    assumed = [
        (
            name and not named and not saved,
            f'nothing from args.model={name!r}, which is no name of the original code',
        ),
        (
            layout in ('middle', 'head') and 'cls_token' not in known,
            'the file does not tell where its class token stands: in the middle, as in published files',
        ),
        (told is None, 'the file does not tell whether it was trained with rotary embedding: it was not'),
        (
            backbone['rotary'] and 'rotary' not in known,
            "the file does not tell which streams rotary embedding turns: 'both'",
        ),
        (
            found['directions'] == 'v2' and 'divide_output' not in known,
            'the file does not tell whether the sum of both directions is halved: it is, as in published files',
        ),
        (
            stride != patch and 'patch_stride' not in known,
            'a grid of 27x27 is taken for that of 224 pixels every 8, as in published long-sequence files',
        ),
    ]
    notes = [note for is_assumed, note in assumed if is_assumed]
    return Identity('Vim', size, backbone, image_size, facts, notes)


def _class_token_remedy(count: object) -> str:
    return 'set cls_token=' + {'none': 'None', 'one': "'middle'", 'double': "'double'"}[str(count)]


WEIGHTS = Family(
    name='Vim',
    read=_read,
    convert=_convert,
    hidden=HIDDEN_SETTINGS,
    values=_values,
    recognise=_recognise,
    known=_known,
    arch=dict(embed_dims=None, depth=None, d_state=16),
    remedies={
        'class tokens': _class_token_remedy,
        'layer scale': lambda scaled: 'set layer_scale_init' + ('' if scaled == 'yes' else '=None'),
    },
)
