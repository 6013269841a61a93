"""Weights of a HierVim fitted to one with other outputs. No weights are published: these are the user's own."""

from collections import OrderedDict
from collections.abc import Mapping, Sequence

from torch import Tensor, nn

from mmvim.checkpoints.fitting import Conversion, abridge, convert_on_load
from mmvim.checkpoints.settings import METADATA, HiddenSetting, differing, same_output

# What neither names nor shapes of a HierVim's weights tell. Not in it, as they change no results of given weights:
# rates, `frozen_stages`, `with_cp`, `scan_backend`. All other arguments show.
HIDDEN_SETTINGS = (
    HiddenSetting('divide_output', 'the sum of both directions is halved in one of them only', refused=True),
    HiddenSetting('out_indices', 'other stages are read', counts=same_output),
)


def hier_vim_state_dict(
    state_dict: Mapping[str, Tensor], *, norms: Sequence[str] = (), num_stages: int = 4
) -> Conversion:
    """Convert the weights of a HierVim to those of one with other outputs.

    Args:
        state_dict: weights by name.
        norms: norms of the outputs that the target has, `outnorm0` to `outnorm3`; others are dropped.
        num_stages: stages that the target has built. Those behind them are dropped, and what leads to them.

    Returns:
        The weights and the names dropped.
    """
    unbuilt = (*(f'stages.{i}.' for i in range(num_stages, 4)), f'stages.{num_stages - 1}.downsample.')

    def is_dropped(name: str) -> bool:
        first = name.partition('.')[0]
        return (first.startswith('outnorm') and first not in norms) or first == 'head' or name.startswith(unbuilt)

    kept = OrderedDict((name, value) for name, value in state_dict.items() if not is_dropped(name))
    return Conversion(kept, dropped=[name for name in state_dict if name not in kept])


def hier_vim_settings(state_dict: Mapping[str, Tensor]) -> dict:
    """Arguments of HierVim, or of its `arch`, that can be read from weights; empty if they are no HierVim's."""
    patch, a_log = state_dict.get('patch_embed.projection.weight'), state_dict.get('stages.0.blocks.0.mixer.A_log')
    mlp = state_dict.get('stages.0.blocks.0.ffn.layers.0.0.weight')
    if patch is None or a_log is None or mlp is None:
        return {}
    blocks = {tuple(name.split('.')[1:4:2]) for name in state_dict if _is_block(name)}
    first = 'stages.0.blocks.0.mixer.'
    directions = 'none'
    if first + 'A_b_log' in state_dict:
        directions = 'v2' if first + 'conv1d_b.weight' in state_dict else 'v1'
    return {
        'embed_dims': patch.shape[0],
        'depths': tuple(sum(stage == str(i) for stage, _ in blocks) for i in range(4)),
        'mlp_ratio': mlp.shape[0] / mlp.shape[1],
        'patch_size': patch.shape[-1],
        'in_channels': patch.shape[1],
        'd_state': a_log.shape[1],
        'directions': directions,
    }


def _is_block(name: str) -> bool:
    parts = name.split('.')
    return parts[0] == 'stages' and parts[2:3] == ['blocks']


def explain_hier_vim(
    file: Mapping[str, Tensor], model: Mapping[str, Tensor], depths: Sequence[int] | None = None
) -> list[str]:
    """Why the weights of a file do not fit a HierVim, one sentence a cause, with the remedy.

    Args:
        file: weights in the file, by name.
        model: state dict of the model.
        depths: blocks of each stage of the model's architecture, where it has not built them all.
    """
    theirs, ours = hier_vim_settings(file), hier_vim_settings(model)
    if not theirs:
        return [f'this is no HierVim checkpoint, it holds {abridge(file)}: give one that belongs to this model']
    if depths is not None:
        ours['depths'] = tuple(depths)
    return [
        f'the file has {name} {value}, the model {ours[name]}: set {name}={value!r}'
        for name, value in theirs.items()
        if value != ours[name]
    ] or ['the file is incomplete or of another make: copy it again']


def load_hier_vim(backbone: nn.Module) -> None:
    """Let a HierVim load the weights of one with other outputs in every way to load; see `convert_on_load`.

    Its weights carry `HIDDEN_SETTINGS` as metadata of the state dict.

    Args:
        backbone: a HierVim.
    """
    backbone._register_state_dict_hook(_after_save)
    may_miss = [f'outnorm{i}.{leaf}' for i in range(4) for leaf in ('weight', 'bias')]
    convert_on_load(backbone, _convert, _explain, _differ, may_miss)


def hier_vim_hidden_settings(backbone: nn.Module) -> dict:
    """Values of a HierVim's `HIDDEN_SETTINGS`, and its out_type."""
    settings = {'out_type': backbone.out_type, 'out_indices': backbone.out_indices}
    mixer = backbone.stages[0].blocks[0].mixer
    if mixer.directions == 'v2':
        settings['divide_output'] = mixer.scale == 0.5
    return settings


def _after_save(backbone, state_dict, prefix, local_metadata) -> None:
    local_metadata[METADATA] = hier_vim_hidden_settings(backbone)


def _differ(backbone, weights: Mapping[str, Tensor], metadata: Mapping) -> tuple[list[str], list[str]]:
    return differing(HIDDEN_SETTINGS, metadata.get(METADATA, {}), hier_vim_hidden_settings(backbone))


def _convert(backbone, weights: Mapping[str, Tensor], metadata: Mapping) -> Conversion:
    norms = [name for name, _ in backbone.named_children() if name.startswith('outnorm')]
    return hier_vim_state_dict(weights, norms=norms, num_stages=len(backbone.stages))


def _explain(backbone, weights: Mapping[str, Tensor]) -> list[str]:
    return explain_hier_vim(weights, backbone.state_dict(), backbone.depths)
