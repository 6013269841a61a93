"""Settings of a backbone that change its results, but neither the names nor the shapes of its weights.

Each family lists its own in a table beside its checkpoint code. A backbone saves their values with its weights as
metadata of the state dict, and compares them when it loads.
"""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

METADATA = 'mmvim'  # the key under which a backbone saves what names and shapes do not tell

Values = Mapping[str, Any]


def always(theirs: Values, ours: Values) -> bool:
    """Any difference counts."""
    return True


def same_output(theirs: Values, ours: Values) -> bool:
    """A difference counts if both have one `out_type`: a classifier's weights are trained on for dense prediction."""
    return theirs.get('out_type') == ours['out_type']


def both_classify(theirs: Values, ours: Values) -> bool:
    """A difference counts between classifiers: dense prediction reads out otherwise on purpose."""
    return 'featmap' not in (theirs.get('out_type'), ours['out_type'])


@dataclass(frozen=True)
class HiddenSetting:
    """A row of a table of settings.

    Attributes:
        name: argument of the backbone, and the key in what it saves.
        effect: what another value does.
        refused: whether a file of another value is refused. So are values that no fine-tuning changes; of the others a
            warning is logged.
        counts: from the values of the file and those of the backbone to whether a difference is to be told.
        in_arch: whether it is an entry of the backbone's `arch`.
    """

    name: str
    effect: str
    refused: bool = False
    counts: Callable[[Values, Values], bool] = always
    in_arch: bool = False


def arguments(values: Values, table: Sequence[HiddenSetting]) -> dict:
    """Arguments by which a backbone gets the settings of a file; those of its `arch` are left out."""
    names = {row.name for row in table if not row.in_arch} | {'out_type'}
    return {name: value for name, value in values.items() if name in names}


def differing(
    table: Sequence[HiddenSetting], theirs: Values, ours: Values, evidence: Mapping[str, str] | None = None
) -> tuple[list[str], list[str]]:
    """Compare the settings of a file with those of a backbone.

    Args:
        table: the settings of the backbone's family.
        theirs: values that are known of the file; others are not compared.
        ours: values of the backbone.
        evidence: by what a value of the file is known, in words, where the backbone did not save it itself.

    Returns:
        What is refused and what to warn of, a clause for each setting.
    """
    refused, warned = [], []
    for row in table:
        if row.name not in theirs or row.name not in ours or theirs[row.name] == ours[row.name]:
            continue
        if row.counts(theirs, ours):
            value = theirs[row.name]
            known = f' ({evidence[row.name]})' if evidence and row.name in evidence else ''
            clause = f'{row.name}={value!r} in the file{known}, {ours[row.name]!r} in the model, so that {row.effect}: '
            clause += f'set {row.name}={value!r}' + (' in arch' if row.in_arch else '')
            (refused if row.refused else warned).append(clause)
    return refused, warned


def saved_values(weights: Mapping) -> Values:
    """What a backbone of this package saved beside its weights; empty if it did not save them."""
    return file_metadata(weights).get(METADATA, {})


def file_metadata(weights: Mapping) -> Mapping:
    """Metadata of the module whose weights a state dict holds."""
    return getattr(weights, '_metadata', {}).get('', {})
