"""Names of whole classifiers: those of published files, and those of MMPretrain."""

import re
from collections import OrderedDict
from collections.abc import Mapping

from torch import Tensor, nn

# a published classifier -> mmpretrain's ImageClassifier with a LinearClsHead; the first pattern that fits counts.
# Some files come from a class that holds the network as `model`.
CLASSIFIER_RENAMES = ((r'^(model\.)?head\.', 'head.fc.'), (r'^(model\.)?', 'backbone.'))

# entry of a backbone's metadata: its weights came from a published classifier, whose head is the host's now
PUBLISHED_HEAD = 'published_head'


def published_head(weights: Mapping[str, Tensor], metadata: Mapping) -> bool:
    """Whether weights by published name are, or were, beside the head of a published classifier."""
    return PUBLISHED_HEAD in metadata or not {'head.weight', 'model.head.weight'}.isdisjoint(weights)


def to_classifier(state_dict: Mapping[str, Tensor]) -> OrderedDict[str, Tensor]:
    """Weights of a published classifier under the names of mmpretrain's ImageClassifier with a LinearClsHead.

    Metadata of the backbone, as a state dict of torch has it, goes with the backbone's weights.
    """
    renamed = OrderedDict()
    for name, value in state_dict.items():
        pattern, replacement = next(rename for rename in CLASSIFIER_RENAMES if re.search(rename[0], name))
        renamed[re.sub(pattern, replacement, name, count=1)] = value
    metadata = getattr(state_dict, '_metadata', None)
    if metadata is not None:
        of_backbone = {f'backbone.{name}'.rstrip('.'): value for name, value in metadata.items() if name != 'backbone'}
        renamed._metadata = OrderedDict({'': metadata.get('', {}), **of_backbone})
    if published_head(state_dict, {}):
        renamed._metadata = getattr(renamed, '_metadata', OrderedDict())
        renamed._metadata['backbone'] = {**renamed._metadata.get('backbone', {}), PUBLISHED_HEAD: True}
    return renamed


def fit_to_classifier(model: nn.Module, state_dict: Mapping[str, Tensor]) -> Mapping[str, Tensor]:
    """Weights under the model's names, if they have no name for the backbone, but the model is a classifier with one.

    Args:
        model: any model; only those with a `head` and a `backbone` that loads published weights matter.
        state_dict: weights by name; a state dict of other names or for another model is returned as it is.
    """
    takes_published = hasattr(getattr(model, 'backbone', None), 'load_report') and hasattr(model, 'head')
    if not takes_published or any(name.startswith('backbone.') for name in state_dict):
        return state_dict
    return to_classifier(state_dict)
