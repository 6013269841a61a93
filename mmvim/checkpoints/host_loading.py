"""Two of mmengine's functions that every host loads files with, changed where they would lose weights in silence.

Importing this module puts them in place: `load_checkpoint`, the runners, `init_cfg` and the hosts' `get_model` and
`init_detector` look them up at each call. For models without a backbone of this package they do what mmengine's do.
"""

from collections import OrderedDict
from collections.abc import Mapping

from mmengine.runner import checkpoint as host
from torch import Tensor, nn

from mmvim.checkpoints.classifier import fit_to_classifier
from mmvim.checkpoints.reading import SOURCE, MapLocation, facts_of_file
from mmvim.errors import CheckpointError

_load_state_dict = host.load_state_dict


def load_state_dict(module: nn.Module, state_dict: Mapping[str, Tensor], strict: bool = False, logger=None) -> None:
    """mmengine's `load_state_dict`, which takes the file of a published classifier for a classifier of MMPretrain too.

    Raises:
        CheckpointError: if the weights do not fit the backbone.
    """
    if SOURCE in getattr(state_dict, '_metadata', {}).get('', {}):
        state_dict = fit_to_classifier(module, state_dict)
    _load_state_dict(module, state_dict, strict, logger)


def load_checkpoint_with_prefix(prefix: str, filename: str, map_location: MapLocation = None) -> OrderedDict:
    """mmengine's function for `init_cfg=dict(type='Pretrained', prefix=...)`, which keeps the weights' metadata.

    Without the metadata a backbone would not know that its weights come from a file and must be complete, nor their
    grid of patches.

    Raises:
        CheckpointError: if no name in the file has the prefix.
    """
    checkpoint = host._load_checkpoint(filename, map_location=map_location)
    weights = checkpoint.get('state_dict', checkpoint)
    prefix = prefix.rstrip('.') + '.'
    found = OrderedDict(
        (name.removeprefix(prefix), value) for name, value in weights.items() if name.startswith(prefix)
    )
    if not found:
        raise CheckpointError(
            f"checkpoint '{filename}' has no weights under '{prefix}', it holds {', '.join(list(weights)[:3])}, ...: "
            'leave prefix out of init_cfg if they are the backbone alone or a published classifier'
        )
    metadata = getattr(weights, '_metadata', {})
    found._metadata = OrderedDict(
        (name.removeprefix(prefix.rstrip('.')).lstrip('.'), value)
        for name, value in metadata.items()
        if f'{name}.'.startswith(prefix)
    )
    found._metadata[''] = {**found._metadata.get('', {}), **facts_of_file(metadata.get('', {}))}
    return found


host.load_state_dict = load_state_dict
host._load_checkpoint_with_prefix = load_checkpoint_with_prefix
