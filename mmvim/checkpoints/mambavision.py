"""Published MambaVision weights and our own, fitted to a MambaVision with another read-out."""

from collections import OrderedDict
from collections.abc import Mapping, Sequence

from torch import Tensor, nn

from mmvim.checkpoints.classifier import published_head
from mmvim.checkpoints.fitting import Conversion, abridge, convert_on_load
from mmvim.checkpoints.settings import METADATA, HiddenSetting, differing, same_output

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
    if state_dict and all(name.startswith(INNER) for name in state_dict):
        state_dict = {name.removeprefix(INNER): value for name, value in state_dict.items()}
    unbuilt = tuple(f'levels.{i}.' for i in range(num_levels, 4))

    def is_dropped(name: str) -> bool:
        first = name.partition('.')[0]
        if first == 'head':
            return True
        if first == 'norm' or first.startswith('outnorm'):
            return first not in norms
        return name.startswith((*unbuilt, f'levels.{num_levels - 1}.downsample.'))

    kept = OrderedDict((name, value) for name, value in state_dict.items() if not is_dropped(name))
    return Conversion(kept, dropped=[name for name in state_dict if name not in kept])


def mambavision_settings(state_dict: Mapping[str, Tensor]) -> dict:
    """Arguments of MambaVision, or of its `arch`, that can be read from weights; empty if they are no MambaVision's."""
    first, second = (state_dict.get(f'patch_embed.conv_down.{i}.weight') for i in (0, 3))
    if first is None or second is None:
        return {}
    blocks = sorted({tuple(map(int, n.split('.')[1:4:2])) for n in state_dict if _is_block(n)})
    depths = tuple(sum(level == i for level, _ in blocks) for i in range(4))
    scans = [name for name in state_dict if name.endswith('mixer.A_log')]
    mlp = next((value for name, value in state_dict.items() if name.endswith('mlp.fc1.weight')), None)
    settings = {
        'embed_dims': second.shape[0],
        'stem_channels': first.shape[0],
        'in_channels': first.shape[1],
        'depths': depths,
        'layer scale': 'yes' if any(name.endswith('.gamma_1') for name in state_dict) else 'no',
        'attention': tuple(f'levels.{i}.blocks.{j}.mixer.qkv.weight' in state_dict for i, j in blocks if i > 1),
    }
    if mlp is not None:
        settings['mlp_ratio'] = mlp.shape[0] / mlp.shape[1]
    if scans:
        mixer = scans[0].removesuffix('A_log')
        out_proj = state_dict.get(f'{mixer}out_proj.weight')
        conv = state_dict.get(f'{mixer}conv1d_x.weight')
        settings['d_state'] = state_dict[scans[0]].shape[1]
        if conv is not None:
            settings['d_conv'] = conv.shape[-1]
        settings['mixer_symmetric'] = f'{mixer}conv1d_z.weight' in state_dict
        if out_proj is not None:
            settings['mixer_merge'] = 'concat' if out_proj.shape[0] == out_proj.shape[1] else 'gate'
    return settings


def _is_block(name: str) -> bool:
    return name.startswith('levels.') and name.split('.')[2] == 'blocks'


def explain_mambavision(
    file: Mapping[str, Tensor], model: Mapping[str, Tensor], depths: Sequence[int] | None = None
) -> list[str]:
    """Why the weights of a file do not fit a MambaVision, one sentence a cause, with the remedy.

    Args:
        file: weights in the file, by published name.
        model: state dict of the model.
        depths: blocks of each level of the model's architecture, where it has not built them all.
    """
    # the backbone imports this module
    from mmvim.models.backbones.mambavision import PLACES, MambaVision, attention_places

    theirs, ours = mambavision_settings(file), mambavision_settings(model)
    if not theirs:
        return [f'this is no MambaVision checkpoint, it holds {abridge(file)}: give one that belongs to this model']
    if depths is not None and ours['depths'] != tuple(depths):
        built = sum(ours['depths'][2:])  # of an arch that is built to its last level but one, say
        ours['depths'] = tuple(depths)
        theirs['attention'] = theirs['attention'][:built]
    of_arch = ('embed_dims', 'stem_channels', 'depths', 'layer scale')
    reasons = []
    if any(theirs[key] != ours[key] for key in of_arch):
        described = ', '.join(f'{key} {theirs[key]}' for key in of_arch)
        names = [
            name
            for name, arch in MambaVision.arch_zoo.items()
            if [arch[key] for key in of_arch[:3]] == [theirs[key] for key in of_arch[:3]]
            and ('layer_scale' in arch) == (theirs['layer scale'] == 'yes')
        ]
        remedy = f'set arch={names[-1]!r}' if names else 'set arch to a dict with these'
        reasons.append(f'the file has {described}, the model {", ".join(str(ours[k]) for k in of_arch)}: {remedy}')
    elif theirs['attention'] != ours['attention']:
        pattern = {
            place: sum((attention_places(depth, place) for depth in theirs['depths'][2:]), ())[: len(ours['attention'])]
            for place in (*PLACES, *range(2, max(theirs['depths']) + 1))
        }
        known = [place for place, places in pattern.items() if places == theirs['attention']]
        remedy = f'set attention={known[0]!r}' if known else 'no value of attention gives these'
        reasons.append(f'attention stands in other blocks of the file than of the model: {remedy}')
    for key in ('in_channels', 'd_state', 'd_conv', 'mlp_ratio', 'mixer_symmetric', 'mixer_merge'):
        if key in theirs and key in ours and theirs[key] != ours[key]:
            where = ' in arch' if key in ('d_state', 'd_conv', 'mlp_ratio') else ''
            remedy = f'set {key}={theirs[key]!r}{where}'
            reasons.append(f'the file has {key} {theirs[key]!r}, the model {ours[key]!r}: {remedy}')
    if 'norm.weight' in model and 'norm.weight' not in file:
        reasons.append("the file lacks the classifier's norm: set out_type='featmap'")
    return reasons or ['the file is incomplete or of another make: get it again from where it was published']


def load_published_mambavision(backbone: nn.Module) -> None:
    """Let a MambaVision load published weights in every way to load; see `convert_on_load` for what is raised.

    Its own weights carry `HIDDEN_SETTINGS` as metadata of the state dict.

    Args:
        backbone: a MambaVision.
    """
    backbone._register_state_dict_hook(_after_save)
    may_miss = [f'outnorm{i}.{leaf}' for i in range(4) for leaf in ('weight', 'bias')]
    convert_on_load(backbone, _convert, _explain, _differ, may_miss)


def mambavision_hidden_settings(backbone: nn.Module) -> dict:
    """Values of a MambaVision's `HIDDEN_SETTINGS`, and its out_type."""
    return {
        'mixer_conv': backbone.mixer_conv,
        'num_heads': backbone.num_heads,
        'fit_windows': backbone.fit_windows,
        'window_sizes': (8, 8, *backbone.window_sizes[2:]),  # levels 0 and 1 have none
        'out_type': backbone.out_type,
        'out_indices': backbone.out_indices,
    }


def _after_save(backbone, state_dict, prefix, local_metadata) -> None:
    local_metadata[METADATA] = mambavision_hidden_settings(backbone)


def _differ(backbone, weights: Mapping[str, Tensor], metadata: Mapping) -> tuple[list[str], list[str]]:
    ours = mambavision_hidden_settings(backbone)
    if METADATA in metadata:
        return differing(HIDDEN_SETTINGS, metadata[METADATA], ours)
    head = published_head(weights, metadata)
    theirs = published_settings(mambavision_state_dict(weights).state_dict, head=head)
    if ours['out_type'] != theirs.get('out_type'):  # to fit windows in dense prediction is what the setting is for
        theirs.pop('fit_windows', None)
    evidence = dict.fromkeys(theirs, 'as in all published ones') | {'window_sizes': 'as in all published of its size'}
    refused, warned = differing(HIDDEN_SETTINGS, theirs, ours, evidence)
    return [], refused + warned


def published_settings(weights: Mapping[str, Tensor], *, head: bool) -> dict:
    """Settings that all published files of a size have.

    Args:
        weights: weights by published name.
        head: whether they come from a published classifier.
    """
    # the backbone imports this module
    from mmvim.models.backbones.mambavision import MambaVision

    found = mambavision_settings(weights)
    if not found:
        return {}
    keys = ('embed_dims', 'stem_channels', 'depths')
    names = [name for name, a in MambaVision.arch_zoo.items() if all(a[key] == found[key] for key in keys)]
    settings = {'mixer_conv': 'same'}
    if names:
        settings['num_heads'] = MambaVision.arch_zoo[names[-1]]['num_heads']
    if names and head:
        settings |= {'fit_windows': False, 'out_type': 'avg_featmap'}
        if names[-1] not in OTHER_RESOLUTIONS:
            settings['window_sizes'] = (8, 8, 14, 7)
    return settings


def _convert(backbone, weights: Mapping[str, Tensor], metadata: Mapping) -> Conversion:
    norms = [name for name, _ in backbone.named_children() if name == 'norm' or name.startswith('outnorm')]
    return mambavision_state_dict(weights, norms=norms, num_levels=len(backbone.levels))


def _explain(backbone, weights: Mapping[str, Tensor]) -> list[str]:
    weights = mambavision_state_dict(weights, norms=['norm']).state_dict
    return explain_mambavision(weights, backbone.state_dict(), backbone.depths)
