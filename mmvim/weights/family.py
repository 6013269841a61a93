"""How files fit the backbones of one family; each fills in a `Family` beside its model."""

from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, field
from typing import cast

from torch import Tensor, nn

from mmvim.weights.fitting import Conversion, abridge, convert_on_load
from mmvim.weights.settings import METADATA, HiddenSetting, Values, differing


class Words(str):
    """The value of a setting in words; messages show it without quotes."""

    __repr__ = str.__str__


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


@dataclass
class Known:
    """Hidden settings of a file whose backbone did not save them.

    Attributes:
        values: the settings that are known.
        evidence: by what each is known, in words.
        notes: what the file leaves open, in words.
    """

    values: dict = field(default_factory=dict)
    evidence: dict = field(default_factory=dict)
    notes: list[str] = field(default_factory=list)


def attributes(backbone: nn.Module) -> dict:
    """Values of a backbone's hidden settings that are attributes of the same name, its `out_type` and its `grid`."""
    names = ('out_type', 'grid', *(row.name for row in backbone.WEIGHTS.hidden))
    return {name: getattr(backbone, name) for name in names if hasattr(backbone, name)}


@dataclass(frozen=True)
class Family:
    """How files fit the backbones of one family.

    Attributes:
        name: of the family, for messages.
        read: from weights by our names, and the backbone that they are for if there is one, to the settings that names
            and shapes show; empty if the weights are of another family.
        convert: from a backbone, weights by published name, and their metadata to the backbone's own weights.
        hidden: the settings that neither names nor shapes show.
        recognise: from weights by published name and the sizes by name to the backbone that takes them; None if they
            are of another family.
        values: from a backbone to the values of its hidden settings, and what else it saves with its weights.
        known: from the backbone, weights by published name, their metadata and the values of the backbone to the hidden
            settings of a file that did not save them.
        rename: from published names to ours.
        arch: settings that are keys of `arch`, with the values that sizes have where they leave the key out; None
            where there is no such value.
        remedies: from the value in the file to what to do, of the settings that cannot be set as they are.
        lacking: what a file without a weight lacks, and what to set.
        foreign: reasons for parts of names that no backbone of the family has.
        may_miss: see `compare`.
    """

    name: str
    read: Callable[[Mapping[str, Tensor], nn.Module | None], dict]
    convert: Callable[[nn.Module, Mapping[str, Tensor], Mapping], Conversion]
    hidden: tuple[HiddenSetting, ...]
    recognise: Callable[[Mapping[str, Tensor], Mapping[str, Mapping]], Identity | None]
    values: Callable[[nn.Module], dict] = attributes
    known: Callable[[nn.Module, Mapping[str, Tensor], Mapping, Values], Known] = lambda *_: Known()
    rename: Callable[[Mapping[str, Tensor]], Mapping[str, Tensor]] = dict
    arch: Mapping[str, object] = field(default_factory=dict)
    remedies: Mapping[str, Callable[[object], str]] = field(default_factory=dict)
    lacking: Mapping[str, str] = field(default_factory=dict)
    foreign: Mapping[str, str] = field(default_factory=dict)
    may_miss: Iterable[str] = ()

    def arguments(self, settings: Mapping) -> dict:
        """Those of the settings that weights show which are no keys of `arch`."""
        return {key: value for key, value in settings.items() if key not in self.arch}

    def size_of(self, arch_zoo: Mapping[str, Mapping], settings: Mapping) -> str | None:
        """The last name of the size with these settings, as far as they are keys of `arch`; None if there is none."""
        shown = {key: value for key, value in settings.items() if key in self.arch}
        for name, arch in reversed(list(arch_zoo.items())):
            if all(arch.get(key, self.arch[key]) == value for key, value in shown.items()):
                return name
        return None


def explain(backbone: nn.Module, weights: Mapping[str, Tensor]) -> list[str]:
    """Why the weights of a file do not fit a backbone, a clause for each remedy.

    Args:
        backbone: a backbone of a `Family`, which is its attribute `WEIGHTS`.
        weights: weights in the file, by published name.
    """
    family = backbone.WEIGHTS
    weights, own = family.rename(weights), backbone.state_dict()
    theirs, ours = family.read(weights, backbone), family.read(own, backbone)
    if not theirs:
        return [
            f'this is no {family.name} checkpoint, it holds {abridge(weights)}: give one that belongs to this model'
        ]
    # the model may not have built all blocks of its arch
    ours |= {key: getattr(backbone, key) for key in ('depth', 'depths') if key in ours}
    size = family.size_of(backbone.arch_zoo, theirs)
    reasons: dict[str, list[str]] = {}
    for key, value in theirs.items():
        if key in ours and value != ours[key]:
            if key in family.remedies:
                remedy = family.remedies[key](value)
            elif key in family.arch:
                remedy = f'set arch={size!r}' if size else f'set {key}={value!r} in arch'
            else:
                remedy = f'set {key}={value!r}'
            reasons.setdefault(remedy, []).append(f'{key} {value!r}, the model {ours[key]!r}')
    return [
        *(f'the file has {", ".join(differences)}: {remedy}' for remedy, differences in reasons.items()),
        *(words for name, words in family.lacking.items() if name in own and name not in weights),
        *(words for part, words in family.foreign.items() if any(part in name for name in weights)),
    ]


def differ(backbone: nn.Module, weights: Mapping[str, Tensor], metadata: Mapping) -> tuple[list[str], list[str]]:
    """Hidden settings of a file that a backbone has not: those that are refused, and those to warn of.

    Args:
        backbone: a backbone of a `Family`.
        weights: weights in the file, by published name.
        metadata: what was saved beside them.
    """
    family = cast(Family, backbone.WEIGHTS)
    ours = family.values(backbone)
    if METADATA in metadata:
        return differing(family.hidden, metadata[METADATA], ours)
    known = family.known(backbone, weights, metadata, ours)
    refused, warned = differing(family.hidden, known.values, ours, known.evidence)
    return [], refused + warned + known.notes  # what was not saved may be wrong


def convert(backbone: nn.Module, weights: Mapping[str, Tensor], metadata: Mapping) -> Conversion:
    """Weights of a file under the names of a backbone of a `Family`."""
    return backbone.WEIGHTS.convert(backbone, weights, metadata)


def load_published(backbone: nn.Module) -> None:
    """Let a backbone load published weights, and its own at another size or read-out, in every way to load.

    Its own weights carry `Family.values` as metadata of the state dict. See `convert_on_load` for what is raised and
    warned of.

    Args:
        backbone: a backbone of a `Family`; one that does so already stays as it is.
    """
    if not hasattr(backbone, 'load_report'):
        backbone._register_state_dict_hook(_after_save)
        convert_on_load(backbone, convert, explain, differ, backbone.WEIGHTS.may_miss)


def _after_save(backbone, state_dict, prefix, local_metadata) -> None:
    local_metadata[METADATA] = backbone.WEIGHTS.values(backbone)
