"""Published MambaVision weights and our own, fitted to a MambaVision with another read-out."""

from collections.abc import Mapping, Sequence

from torch import Tensor, nn

from mmvim.models.backbones.mambavision.mixer import PLACES, attention_places
from mmvim.models.conversion import (
    OUTPUT_NORMS,
    convert_stages,
    count_blocks,
    drop_unbuilt_stages,
    stage_outputs,
)
from mmvim.weights.classifier import published_head
from mmvim.weights.family import Family, Identity, Known
from mmvim.weights.fitting import Conversion
from mmvim.weights.settings import HiddenSetting, Values, arguments, same_output, saved_values

# files saved through a class that holds the network as `model` have this before every name
INNER = 'model.'
# sizes that were published for other images than those of 224 pixels, with windows of other sides, which no name tells
OTHER_RESOLUTIONS = ('large2', 'large3')

# What neither names nor shapes of a MambaVision's weights tell. Not in it, as they change no results of given weights:
# rates, `dt_init`, `frozen_stages`, `norm_eval`, `with_cp`, `scan_backend`. All other arguments show.
HIDDEN_SETTINGS = (
    HiddenSetting('mixer_conv', 'convolutions see other neighbours', refused=True),
    HiddenSetting('num_heads', 'attention splits its channels otherwise', refused=True, in_arch=True),
    # smaller windows for training from ImageNet weights are what the setting is for
    HiddenSetting('fit_windows', 'outputs differ wherever windows were padded'),
    # every task has windows of its own, so that only those of one kind of output are compared
    HiddenSetting('window_sizes', 'scans and attention see other windows in levels 2 and 3', counts=same_output),
    HiddenSetting('out_indices', 'other levels are read', counts=same_output),
)


def mambavision_state_dict(
    state_dict: Mapping[str, Tensor], *, norms: Sequence[str] = (), num_levels: int = 4
) -> Conversion:
    """Convert the weights of a MambaVision to those of one with other outputs.

    Args:
        state_dict: weights by published name, or with `model.` before it.
        norms: norms behind the levels that the target has: `norm` of the classifier, `outnorm0` to `outnorm3` of a
            dense backbone. Others are dropped, and the classifier's `head` always is.
        num_levels: levels that the target has built. Those behind them are dropped, and what leads to them.

    Returns:
        The weights and the names dropped.
    """
    return drop_unbuilt_stages(_rename(state_dict), 'levels', num_levels, norms)


def _rename(state_dict: Mapping[str, Tensor]) -> Mapping[str, Tensor]:
    if not all(name.startswith(INNER) for name in state_dict):
        return state_dict
    return {name.removeprefix(INNER): value for name, value in state_dict.items()}


def _read(state_dict: Mapping[str, Tensor], backbone: nn.Module | None = None) -> dict:
    """Arguments of MambaVision, or of its `arch`, that can be read from weights; empty if they are no MambaVision's."""
    first, second = (state_dict.get(f'patch_embed.conv_down.{i}.weight') for i in (0, 3))
    if first is None or second is None:
        return {}
    depths = count_blocks(state_dict, 'levels')
    settings = {
        'embed_dims': second.shape[0],
        'stem_channels': first.shape[0],
        'depths': depths,
        'layer_scale': 1e-5 if any(name.endswith('.gamma_1') for name in state_dict) else None,
        'in_channels': first.shape[1],
        'attention': _attention(state_dict, depths[: None if backbone is None else len(backbone.levels)]),
    }
    mlp = next((value for name, value in state_dict.items() if name.endswith('mlp.fc1.weight')), None)
    if mlp is not None:
        settings['mlp_ratio'] = mlp.shape[0] / mlp.shape[1]
    scan = next((name for name in state_dict if name.endswith('mixer.A_log')), None)
    if scan is not None:
        mixer = scan.removesuffix('A_log')
        settings['d_state'] = state_dict[scan].shape[1]
        settings['mixer_symmetric'] = f'{mixer}conv1d_z.weight' in state_dict
        if f'{mixer}conv1d_x.weight' in state_dict:
            settings['d_conv'] = state_dict[f'{mixer}conv1d_x.weight'].shape[-1]
        out_proj = state_dict.get(f'{mixer}out_proj.weight')
        if out_proj is not None:
            settings['mixer_merge'] = 'concat' if out_proj.shape[0] == out_proj.shape[1] else 'gate'
    return settings


def _attention_blocks(state_dict: Mapping[str, Tensor], depths: Sequence[int]) -> tuple[bool, ...]:
    """Which blocks of levels 2 and 3, as far as depths are given, are attention."""
    blocks = [(i, j) for i, depth in enumerate(depths) if i > 1 for j in range(depth)]
    return tuple(f'levels.{i}.blocks.{j}.mixer.qkv.weight' in state_dict for i, j in blocks)


def _attention(state_dict: Mapping[str, Tensor], depths: Sequence[int]) -> str | int | tuple[bool, ...]:
    """The argument `attention`; which blocks are attention if no value of it gives these."""
    found = _attention_blocks(state_dict, depths)
    for place in ('last', *PLACES, *range(2, max(depths) + 1)):
        if sum((attention_places(depth, place) for depth in depths[2:]), ()) == found:
            return place
    return found


def _attention_remedy(value: object) -> str:
    return 'no value of attention gives these blocks' if isinstance(value, tuple) else f'set attention={value!r}'


def _known(backbone: nn.Module, weights: Mapping[str, Tensor], metadata: Mapping, ours: Values) -> Known:
    """Settings that all published files of a size have."""
    found = _read(_rename(weights))
    if not found:
        return Known()
    shown = {key: found[key] for key in ('embed_dims', 'stem_channels', 'depths')}
    size = WEIGHTS.size_of(backbone.arch_zoo, shown)
    values: dict[str, object] = {'mixer_conv': 'same'}
    if size:
        values['num_heads'] = backbone.arch_zoo[size]['num_heads']
    if size and published_head(weights, metadata):
        values['out_type'] = 'avg_featmap'
        if ours['out_type'] == 'avg_featmap':  # to fit windows in dense prediction is what the setting is for
            values['fit_windows'] = False
        if size not in OTHER_RESOLUTIONS:
            values['window_sizes'] = (8, 8, 14, 7)
    evidence = dict.fromkeys(values, 'as in all published ones') | {'window_sizes': 'as in all published of its size'}
    return Known(values, evidence)


def _recognise(file: Mapping[str, Tensor], arch_zoo: Mapping[str, Mapping]) -> Identity | None:
    weights, saved = _rename(file), saved_values(file)
    found = _read(weights)
    if not found:
        return None
    depths = found['depths']
    size = WEIGHTS.size_of(arch_zoo, found)
    if size and saved.get('num_heads', arch_zoo[size]['num_heads']) != arch_zoo[size]['num_heads']:
        size = None
    arch = {key: found.get(key, usual) for key, usual in WEIGHTS.arch.items()}
    arch |= dict(depths=tuple(max(depth, 1) for depth in depths), num_heads=saved.get('num_heads', (1, 1, 1, 1)))
    backbone = dict(
        type='mmvim.MambaVision',
        arch=size or arch,
        **WEIGHTS.arguments(found),
        **stage_outputs(weights, depths),
    )
    if isinstance(found['attention'], tuple):
        backbone['attention'] = 'last'
    backbone |= arguments(saved, HIDDEN_SETTINGS)
    facts = [
        f'depths {"-".join(map(str, depths))}, width {found["embed_dims"]}, stem {found["stem_channels"]}',
        f'{sum(_attention_blocks(weights, depths))} attention blocks',
        f'layer scale: {"no" if found["layer_scale"] is None else "yes"}',
    ]
    notes = []
    if 'window_sizes' not in saved:
        notes.append('the file does not tell the windows: (14, 7) in levels 2 and 3, as published for 224 pixels')
    if not saved:
        notes.append("nor the mixer's convolution: 'same', as published")
    if not size and not saved:
        notes.append('the file does not tell the number of heads: 1')
    return Identity('MambaVision', size, backbone, (224, 224), facts, notes)


WEIGHTS = Family(
    name='MambaVision',
    read=_read,
    convert=convert_stages,
    hidden=HIDDEN_SETTINGS,
    recognise=_recognise,
    known=_known,
    rename=_rename,
    arch=dict(embed_dims=None, stem_channels=None, depths=None, layer_scale=None, mlp_ratio=4, d_state=8, d_conv=3),
    remedies=dict(attention=_attention_remedy),
    lacking={'norm.weight': "the file lacks the classifier's norm: set out_type='featmap'"},
    may_miss=OUTPUT_NORMS,
)
