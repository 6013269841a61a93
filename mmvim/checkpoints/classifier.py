"""Names of whole classifiers: those of published files, and those of MMPretrain."""

import re
from collections import OrderedDict
from collections.abc import Mapping

from torch import Tensor

# a published classifier -> mmpretrain's ImageClassifier with a LinearClsHead; the first pattern that fits counts.
# Some files come from a class that holds the network as `model`.
CLASSIFIER_RENAMES = ((r'^(model\.)?head\.', 'head.fc.'), (r'^(model\.)?', 'backbone.'))


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
    return renamed
