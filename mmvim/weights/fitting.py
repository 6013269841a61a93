"""Fit the weights of a file to a model: convert on load, compare names and shapes, report, refuse what does not fit."""

import logging
from collections import OrderedDict
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, field
from functools import partial

from mmengine.logging import print_log
from torch import Tensor, nn

from mmvim.errors import CheckpointError
from mmvim.weights.reading import SOURCE, facts_of_file, part_of


@dataclass
class Conversion:
    """Weights under a model's own names, and what became of the file's.

    Attributes:
        state_dict: the weights to load, by name.
        dropped: names in the file that the model has no use for.
        interpolated: what was resized, in words: name, old and new size.
    """

    state_dict: dict[str, Tensor]
    dropped: list[str] = field(default_factory=list)
    interpolated: list[str] = field(default_factory=list)

    @classmethod
    def without(cls, weights: Mapping[str, Tensor], is_dropped: Callable[[str], bool]) -> 'Conversion':
        """Weights but for those of which a function of the name is true."""
        kept = OrderedDict((name, value) for name, value in weights.items() if not is_dropped(name))
        return cls(kept, dropped=[name for name in weights if name not in kept])


@dataclass
class LoadReport:
    """How a file fits a model; `str()` of it is for the log.

    Attributes:
        loaded: names that are in both with one shape.
        dropped: names in the file that the model has no use for.
        interpolated: what was resized, in words.
        missing: names that the file lacks.
        unexpected: names that the model lacks.
        mismatched: shapes in the file and in the model, by name.
        refused: settings of the file that the model must have and has not, in words.
        differing: settings of the file that the model has not, but may be trained with, and what is not known of the
            file, in words.
    """

    loaded: list[str]
    dropped: list[str]
    interpolated: list[str]
    missing: list[str]
    unexpected: list[str]
    mismatched: dict[str, tuple[tuple[int, ...], tuple[int, ...]]]
    refused: list[str] = field(default_factory=list)
    differing: list[str] = field(default_factory=list)

    @property
    def fits(self) -> bool:
        """Whether exactly the model's weights are in the file, in their shapes, and no setting is refused."""
        return not (self.missing or self.unexpected or self.mismatched or self.refused)

    def __str__(self) -> str:
        shapes = [
            f'{name} {theirs} in the file, {ours} in the model' for name, (theirs, ours) in self.mismatched.items()
        ]
        parts = [
            f'{len(names)} {what}' + (f' ({abridge(names)})' if what != 'loaded' else '')
            for what, names in (
                ('loaded', self.loaded),
                ('dropped', self.dropped),
                ('interpolated', self.interpolated),
                ('missing in the file', self.missing),
                ('unknown to the model', self.unexpected),
                ('of another shape', shapes),
            )
            if names
        ]
        parts += [f'other settings ({"; ".join(self.refused)})'] if self.refused else []
        return ', '.join(parts) or 'no weights'


def abridge(names: Iterable[str], limit: int = 3) -> str:
    """The first names, and how many more there are."""
    names = list(names)
    return ', '.join(names[:limit]) + (f' and {len(names) - limit} more' if len(names) > limit else '')


def compare(conversion: Conversion, wanted: Mapping[str, Tensor], may_miss: Iterable[str] = ()) -> LoadReport:
    """Compare converted weights with a model's own.

    Args:
        conversion: the weights, converted.
        wanted: state dict of the model.
        may_miss: names that published files lack by nature, such as norms that only dense prediction has.
    """
    found, may_miss = conversion.state_dict, set(may_miss)
    both = [name for name in wanted if name in found]
    differ = {name: (tuple(found[name].shape), tuple(wanted[name].shape)) for name in both}
    mismatched = {name: shapes for name, shapes in differ.items() if shapes[0] != shapes[1]}
    return LoadReport(
        loaded=[name for name in both if name not in mismatched],
        dropped=conversion.dropped,
        interpolated=conversion.interpolated,
        missing=[
            name
            for name in wanted
            if name not in found and name not in may_miss and not name.endswith('num_batches_tracked')
        ],
        unexpected=[name for name in found if name not in wanted],
        mismatched=mismatched,
    )


def convert_on_load(
    module: nn.Module,
    convert: Callable[[nn.Module, Mapping[str, Tensor], Mapping], Conversion],
    explain: Callable[[nn.Module, Mapping[str, Tensor]], list[str]],
    differ: Callable[[nn.Module, Mapping[str, Tensor], Mapping], tuple[list[str], list[str]]],
    may_miss: Iterable[str] = (),
) -> None:
    """Make a backbone convert whatever is loaded into it, and refuse what does not fit.

    It works for every way to load: `load_state_dict`, `init_cfg=dict(type='Pretrained', ...)`, and the checkpoint of a
    whole model that holds the backbone under a prefix. Weights that need no conversion stay the same tensors, so a
    resumed run goes on exactly. Without a prefix, a file of a whole model is taken too: its entries under `backbone.`
    are used. If the weights were trained with other settings, one warning tells which. How the last weights fitted
    stays as `module.load_report`, a `LoadReport`; None before. The functions must be importable by name, or the module
    can no longer be pickled.

    Args:
        module: the backbone.
        convert: from the backbone, weights by published name, and the metadata that a backbone saved with them, to the
            backbone's own weights.
        explain: from the backbone and weights that do not fit to sentences that name the cause and the remedy.
        differ: from the backbone, weights by published name, and their metadata to settings of the file that are
            refused and those to warn of, see `LoadReport`.
        may_miss: see `compare`.

    Raises (while loading):
        CheckpointError: if weights or settings do not fit, with all that does not and the remedy. In a plain
            `load_state_dict` only shapes count; missing and unknown names are left to its `strict`, and of settings
            that would be refused a warning is logged.
    """
    module.load_report = None  # type: ignore[assignment]  # torch knows tensors and modules as attributes alone
    hook = partial(_before_load, convert=convert, explain=explain, differ=differ, may_miss=tuple(may_miss))
    module._register_load_state_dict_pre_hook(hook, with_module=True)


def _before_load(
    module,
    state_dict,
    prefix,
    local_metadata,
    strict,
    missing_keys,
    unexpected_keys,
    error_msgs,
    *,
    convert,
    explain,
    differ,
    may_miss,
) -> None:
    given = [name for name in state_dict if name.startswith(prefix)]
    if prefix and not given:
        if SOURCE in local_metadata:
            raise CheckpointError(
                f"checkpoint '{local_metadata[SOURCE]}' has no weights under '{prefix}', which would stay random: give "
                'a checkpoint of the whole model, or, if the file is of the backbone alone, name it in '
                f"model.{prefix}init_cfg=dict(type='Pretrained', checkpoint='{local_metadata[SOURCE]}')"
            )
        return
    weights = OrderedDict((name.removeprefix(prefix), state_dict.pop(name)) for name in given)
    dropped, metadata = [], local_metadata
    if not prefix and any(name.startswith('backbone.') for name in weights):
        # of the file's root torch hands over only what the whole model saved
        metadata = {**getattr(state_dict, '_metadata', {}).get('backbone', {}), **facts_of_file(local_metadata)}
        dropped = [name for name in weights if not name.startswith('backbone.')]
        weights = part_of(weights, 'backbone.')
    conversion = convert(module, weights, metadata)
    conversion.dropped[:0] = dropped
    report = compare(conversion, module.state_dict(), may_miss)
    report.refused, report.differing = differ(module, weights, metadata)
    module.load_report = report
    # torch says strict in any case; what comes from a file must fit, a plain `load_state_dict` does as it is told
    from_file = SOURCE in local_metadata
    source = f" '{local_metadata[SOURCE]}'" if from_file else ''
    if report.mismatched or (from_file and (report.missing or report.unexpected)):
        reasons = explain(module, weights) or [
            'the file is incomplete or of another make: get it again, or use the settings of the model that it was '
            'saved from'
        ]
        raise CheckpointError(
            f'checkpoint{source} does not fit {type(module).__name__}: {report}. Remedy: {"; ".join(reasons)}'
        )
    if from_file and report.refused:
        raise CheckpointError(
            f'checkpoint{source} was trained with other settings than this {type(module).__name__} has: '
            f'{"; ".join(report.refused)}'
        )
    state_dict.update({prefix + name: value for name, value in conversion.state_dict.items()})
    if report.dropped or report.interpolated:
        print_log(f'{type(module).__name__}: {report}', logger='current')
    if report.refused or report.differing:
        print_log(
            f'{type(module).__name__}: check the settings that the weights{source} were trained with: '
            f'{"; ".join(report.refused + report.differing)}. With other settings the weights do not do what they were '
            'trained to do; only a run that trains them further may change settings on purpose',
            logger='current',
            level=logging.WARNING,
        )
