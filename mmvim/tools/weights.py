"""The weights of a backbone in a file, from any model that has one."""

from collections import OrderedDict
from collections.abc import Mapping

from torch import Tensor

PREFIX = 'backbone.'


def backbone_weights(state_dict: Mapping[str, Tensor]) -> tuple[OrderedDict[str, Tensor], list[str]]:
    """Split the weights of a whole model into its backbone's and the rest.

    Metadata that the backbone saved with its weights (grid, class tokens) stay with them.

    Args:
        state_dict: weights of a backbone, of a published classifier, or of a model that has a `backbone`.

    Returns:
        The backbone's weights by its own names, and the names of all others.
    """
    if not any(name.startswith(PREFIX) for name in state_dict):
        return OrderedDict(state_dict) if not hasattr(state_dict, '_metadata') else state_dict, []
    weights = OrderedDict((name.removeprefix(PREFIX), w) for name, w in state_dict.items() if name.startswith(PREFIX))
    metadata = getattr(state_dict, '_metadata', {})
    whole = PREFIX.rstrip('.')
    weights._metadata = OrderedDict(
        (name.removeprefix(whole).lstrip('.'), value)
        for name, value in metadata.items()
        if name == whole or name.startswith(PREFIX)
    )
    return weights, [name for name in state_dict if not name.startswith(PREFIX)]
