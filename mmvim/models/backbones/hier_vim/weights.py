"""Weights of a HierVim fitted to one with other outputs. No weights are published: these are the user's own."""

from collections.abc import Mapping, Sequence

from torch import Tensor, nn

from mmvim.models.conversion import (
    OUTPUT_NORMS,
    convert_stages,
    count_blocks,
    drop_unbuilt_stages,
    scan_directions,
    stage_outputs,
)
from mmvim.weights.family import Family, Identity
from mmvim.weights.fitting import Conversion
from mmvim.weights.settings import HiddenSetting, arguments, same_output, saved_values

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
    return drop_unbuilt_stages(state_dict, 'stages', num_stages, norms)


def _read(state_dict: Mapping[str, Tensor], backbone: nn.Module | None = None) -> dict:
    """Arguments of HierVim, or of its `arch`, that can be read from weights; empty if they are no HierVim's."""
    first = 'stages.0.blocks.0.'
    patch, a_log = state_dict.get('patch_embed.projection.weight'), state_dict.get(f'{first}mixer.A_log')
    mlp = state_dict.get(f'{first}ffn.layers.0.0.weight')
    if patch is None or a_log is None or mlp is None:
        return {}
    return {
        'embed_dims': patch.shape[0],
        'depths': count_blocks(state_dict, 'stages'),
        'mlp_ratio': mlp.shape[0] / mlp.shape[1],
        'patch_size': patch.shape[-1],
        'in_channels': patch.shape[1],
        'd_state': a_log.shape[1],
        'directions': scan_directions(state_dict, f'{first}mixer.') or 'none',
    }


def _recognise(weights: Mapping[str, Tensor], arch_zoo: Mapping[str, Mapping]) -> Identity | None:
    found = _read(weights)
    if not found:
        return None
    size, depths = WEIGHTS.size_of(arch_zoo, found), found['depths']
    arch = {key: found[key] for key in WEIGHTS.arch} | dict(depths=tuple(max(depth, 1) for depth in depths))
    backbone = dict(
        type='mmvim.HierVim',
        arch=size or arch,
        **WEIGHTS.arguments(found),
        **stage_outputs(weights, depths),
    )
    backbone |= arguments(saved_values(weights), HIDDEN_SETTINGS)
    facts = [
        f'depths {"-".join(map(str, depths))}, width {found["embed_dims"]}',
        f'directions {found["directions"]!r}',
    ]
    return Identity('HierVim', size, backbone, (224, 224), facts)


WEIGHTS = Family(
    name='HierVim',
    read=_read,
    convert=convert_stages,
    hidden=HIDDEN_SETTINGS,
    recognise=_recognise,
    arch=dict(embed_dims=None, depths=None, mlp_ratio=4, d_state=16),
    may_miss=OUTPUT_NORMS,
)
