"""Which model a file's weights belong to, and the backbone that takes them."""

import math
from collections.abc import Mapping
from dataclasses import dataclass, field

from torch import Tensor

from mmvim.checkpoints import deit, hier_vim, mambavision, vim
from mmvim.checkpoints.deit import deit_settings, timm_names
from mmvim.checkpoints.hier_vim import hier_vim_settings
from mmvim.checkpoints.mambavision import mambavision_settings, mambavision_state_dict
from mmvim.checkpoints.reading import MODEL_NAME
from mmvim.checkpoints.settings import METADATA, arguments
from mmvim.checkpoints.vim import ARCH_OF_WIDTH as VIM_OF_WIDTH
from mmvim.checkpoints.vim import class_token_names, rotary_in, saved_class_tokens, settings_of_name, vim_settings
from mmvim.errors import CheckpointError

LONG_SEQUENCE = (27, 27)  # 224 pixels in patches of 16 every 8: published long-sequence Vim


@dataclass
class Identity:
    """What the names and shapes of weights tell.

    Attributes:
        family: 'Vim', 'MambaVision', 'HierVim' or 'DeiT'.
        size: the size's name in the backbone's `arch_zoo`; None if it is none of them.
        backbone: settings by which mmengine builds a backbone that takes the weights.
        image_size: height and width of the images that the weights are for, pixels.
        facts: what is known, in words.
        notes: what had to be assumed, in words.
    """

    family: str
    size: str | None
    backbone: dict
    image_size: tuple[int, int]
    facts: list[str]
    notes: list[str] = field(default_factory=list)


def identify(weights: Mapping[str, Tensor]) -> Identity | None:
    """Recognise the weights of a backbone or of a published classifier; None if they are of another model.

    Args:
        weights: by the names that the backbone or its published files give them, without `backbone.`.

    Raises:
        CheckpointError: if the position table of a Vim or DeiT fits no grid.
    """
    for recognise in (_vim, _mambavision, _hier_vim, _deit):
        identity = recognise(weights)
        if identity is not None:
            return identity
    return None


def _saved(weights: Mapping[str, Tensor]) -> Mapping:
    """What a backbone of this package saved beside its weights."""
    return _metadata(weights).get(METADATA, {})


def _metadata(weights: Mapping[str, Tensor]) -> Mapping:
    return getattr(weights, '_metadata', {}).get('', {})


def _vim(weights: Mapping[str, Tensor]) -> Identity | None:
    found = vim_settings(weights)
    if not found:
        return None
    first = 'layers.0.mixer.'
    width, depth = found['embed_dims'], found['depth']
    usual = dict(d_state=16, d_conv=4, expand=2, dt_rank=math.ceil(width / 16))
    mixer = dict(
        d_state=found['d_state'],
        d_conv=_side(weights.get(first + 'conv1d.weight'), -1, 4),
        expand=_side(weights.get(first + 'A_log'), 0, 2 * width) // width,
        dt_rank=_side(weights.get(first + 'dt_proj.weight'), -1, usual['dt_rank']),
    )
    size = VIM_OF_WIDTH.get(width) if depth == 24 and mixer == usual else None
    name = _metadata(weights).get(MODEL_NAME)
    named = settings_of_name(name)
    saved = _saved(weights)
    known = saved or named or {}
    layout = saved_class_tokens(weights, known.get('cls_token') or 'middle')
    grid = known.get('grid') or _grid(weights, len(class_token_names(layout)), 'Vim')
    patch = found['patch_size']
    stride = known.get('patch_stride') or (patch // 2 if grid == LONG_SEQUENCE and patch == 16 else patch)
    image_size = tuple((n - 1) * stride + patch for n in grid)
    direction = 'v2' if "'v2'" in found['directions'] else 'v1' if "'v1'" in found['directions'] else 'none'
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
        directions=direction,
        layer_scale_init=1.0 if found['layer scale'] == 'yes' else None,
        out_type='featmap' if not final_norm else 'cls_token' if layout else 'avg_featmap',
        final_norm=final_norm,
    )
    backbone |= arguments(known, vim.HIDDEN_SETTINGS) | {'rotary': told and told[0]}
    facts = [
        f'{depth} blocks of width {width}',
        f'patches of {patch} pixels every {stride}',
        f'positions for a grid of {grid[0]}x{grid[1]}',
        {None: 'no class token', 'double': 'two class tokens'}.get(layout, f'class token: {layout}'),
        f'directions {found["directions"]}',
        f'rotary {backbone["rotary"]!r}',
    ]
    notes = []
    if name is not None and named is None and not saved:
        notes.append(f'nothing from args.model={name!r}, which is no name of the original code')
    if layout in ('middle', 'head') and 'cls_token' not in known:
        notes.append('the file does not tell where its class token stands: in the middle, as in published files')
    if told is None:
        notes.append('the file does not tell whether it was trained with rotary embedding: it was not')
    if backbone['rotary'] and 'rotary' not in known:
        notes.append("the file does not tell which streams rotary embedding turns: 'both'")
    if 'divide_output' not in known and direction == 'v2':
        notes.append(
            'the file does not tell whether the sum of both directions is halved: it is, as in published files'
        )
    if stride != patch and 'patch_stride' not in known:
        notes.append('a grid of 27x27 is taken for that of 224 pixels every 8, as in published long-sequence files')
    return Identity('Vim', size, backbone, image_size, facts, notes)


def _mambavision(file: Mapping[str, Tensor]) -> Identity | None:
    norms = ['norm', *(f'outnorm{i}' for i in range(4))]
    weights = mambavision_state_dict(file, norms=norms).state_dict
    found = mambavision_settings(weights)
    if not found or 'd_state' not in found and 'attention' not in found:
        return None
    # the backbone imports this package
    from mmvim.models.backbones.mambavision import PLACES, MambaVision, attention_places

    depths, scaled = found['depths'], found['layer scale'] == 'yes'
    saved = _saved(file)
    usual = dict(d_state=8, d_conv=3, mlp_ratio=4)
    inner = {key: found.get(key, value) for key, value in usual.items()}
    names = [
        name
        for name, arch in MambaVision.arch_zoo.items()
        if inner == usual
        and saved.get('num_heads', arch['num_heads']) == arch['num_heads']
        and all(arch[key] == found[key] for key in ('embed_dims', 'stem_channels', 'depths'))
        and ('layer_scale' in arch) == scaled
    ]
    size = names[-1] if names else None
    arch = size or dict(
        embed_dims=found['embed_dims'],
        stem_channels=found['stem_channels'],
        depths=tuple(max(depth, 1) for depth in depths),
        num_heads=saved.get('num_heads', (1, 1, 1, 1)),
        layer_scale=1e-5 if scaled else None,
        **inner,
    )
    places = [
        place
        for place in ('last', *PLACES, *range(2, max(depths) + 1))
        if sum((attention_places(depth, place) for depth in depths[2:]), ()) == found['attention']
    ]
    maps = [i for i in range(4) if f'outnorm{i}.weight' in weights]
    out_type = 'avg_featmap' if 'norm.weight' in weights else 'featmap' if maps else 'raw'
    out_indices = maps if out_type == 'featmap' else [max(i for i in range(4) if depths[i])]
    backbone = dict(
        type='mmvim.MambaVision',
        arch=arch,
        in_channels=found['in_channels'],
        out_type=out_type,
        out_indices=tuple(out_indices),
        attention=places[0] if places else 'last',
        mixer_symmetric=found.get('mixer_symmetric', True),
        mixer_merge=found.get('mixer_merge', 'concat'),
    )
    backbone |= arguments(saved, mambavision.HIDDEN_SETTINGS)
    facts = [
        f'depths {"-".join(map(str, depths))}, width {found["embed_dims"]}, stem {found["stem_channels"]}',
        f'{sum(found["attention"])} attention blocks',
        f'layer scale: {found["layer scale"]}',
    ]
    notes = []
    if 'window_sizes' not in saved:
        notes.append('the file does not tell the windows: (14, 7) in levels 2 and 3, as published for 224 pixels')
    if not saved:
        notes.append("nor the mixer's convolution: 'same', as published")
    if not size and not saved:
        notes.append('the file does not tell the number of heads: 1')
    return Identity('MambaVision', size, backbone, (224, 224), facts, notes)


def _hier_vim(weights: Mapping[str, Tensor]) -> Identity | None:
    found = hier_vim_settings(weights)
    if not found:
        return None
    from mmvim.models.backbones.hier_vim import HierVim

    depths, patch = found['depths'], found['patch_size']
    arch = dict(embed_dims=found['embed_dims'], depths=depths)
    usual = found['mlp_ratio'] == 4 and found['d_state'] == 16
    size = next((name for name, a in reversed(HierVim.arch_zoo.items()) if usual and a == arch), None)
    maps = tuple(i for i in range(4) if f'outnorm{i}.weight' in weights)
    built = [i for i in range(4) if depths[i]]
    backbone = dict(
        type='mmvim.HierVim',
        arch=size
        or dict(
            embed_dims=found['embed_dims'],
            depths=tuple(max(depth, 1) for depth in depths),
            mlp_ratio=found['mlp_ratio'],
            d_state=found['d_state'],
        ),
        in_channels=found['in_channels'],
        patch_size=patch,
        directions=found['directions'],
        out_type='featmap' if maps else 'raw',
        out_indices=maps if maps and maps[-1] == built[-1] else (*maps, built[-1]),
    )
    backbone |= arguments(_saved(weights), hier_vim.HIDDEN_SETTINGS)
    facts = [
        f'depths {"-".join(map(str, depths))}, width {found["embed_dims"]}',
        f'directions {found["directions"]!r}',
    ]
    return Identity('HierVim', size, backbone, (224, 224), facts)


def _deit(weights: Mapping[str, Tensor]) -> Identity | None:
    found = deit_settings(weights)
    if not found:
        return None
    from mmvim.models.backbones.vision_transformer import VisionTransformer

    named = timm_names(weights)
    width, depth, patch = found['embed_dims'], found['depth'], found['patch_size']
    tokens = [name for name in ('cls_token', 'dist_token') if name in named]
    saved = _saved(weights)
    grid = saved.get('grid') or _grid(named, len(tokens), 'DeiT')
    arch = dict(embed_dims=width, depth=depth, num_heads=saved.get('num_heads', max(width // 64, 1)))
    size = next((name for name, a in reversed(VisionTransformer.arch_zoo.items()) if a == arch), None)
    final_norm = 'norm.weight' in named
    distilled = 'dist_token' in tokens
    whole = final_norm and bool(tokens) and not distilled
    backbone = dict(
        type='mmvim.VisionTransformer',
        arch=size or arch,
        img_size=tuple(n * patch for n in grid),
        patch_size=patch,
        in_channels=found['in_channels'],
        with_cls_token='cls_token' in tokens,
        out_type='cls_token' if whole else 'featmap',
        final_norm=final_norm,
    )
    backbone |= arguments(saved, deit.HIDDEN_SETTINGS)
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
    return Identity('DeiT', size, backbone, tuple(n * patch for n in grid), facts, notes)


def _side(weight: Tensor | None, axis: int, default: int) -> int:
    return default if weight is None else weight.shape[axis]


def _grid(weights: Mapping[str, Tensor], tokens: int, family: str) -> tuple[int, int]:
    """Grid of a square position table behind its class tokens; that of 224 pixels if there is no table."""
    from mmvim.models.layers.patch_embed import square_grid

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
