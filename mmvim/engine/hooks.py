"""Checks at the points where a mistake in data, config or checkpoint would otherwise pass unnoticed."""

from collections.abc import Iterator, Mapping, Sequence
from functools import partialmethod
from typing import cast

from mmengine.hooks import Hook
from mmengine.model import is_model_wrapper
from mmengine.runner import Runner
from torch import Tensor, nn

from mmvim.compat.stored_configs import check_stored_config
from mmvim.config.class_counts import OTHER_HEADS, OTHER_PARTS, OTHER_TYPES
from mmvim.errors import CheckpointError, ConfigError
from mmvim.registry import HOOKS
from mmvim.weights import Conversion, compare, find_state_dict, fit_to_classifier
from mmvim.weights.reading import part_of


@HOOKS.register_module()
class ClassCountHook(Hook):
    """Refuse a data set whose classes are not as many as a head of the model has."""

    def check(self, runner: Runner, key: str) -> None:
        """Compare the heads with the data set of the loader of this name."""
        dataset, classes = _dataset_and_classes(getattr(runner, key))
        if classes is None or getattr(dataset, 'return_classes', False):
            return
        for name, count in head_class_counts(unwrapped(runner.model)):
            if count != len(classes):
                shown = ', '.join(map(str, classes[:5])) + (', ...' if len(classes) > 5 else '')
                raise ConfigError(
                    f'model.{name} has {count} classes, but the data set of {key} has {len(classes)} ({shown}): set '
                    "num_classes of the head in the config (model.roi_head.num_classes for mmvim's cascade), or use "
                    'other annotations'
                )

    def before_train(self, runner: Runner) -> None:
        """Compare the heads with the training and the validation data, rather than wait for the first validation."""
        self.check(runner, 'train_dataloader')
        if getattr(runner, 'val_loop', None) is not None:
            self.check(runner, 'val_dataloader')

    before_val = partialmethod(check, key='val_dataloader')
    before_test = partialmethod(check, key='test_dataloader')


def _dataset_and_classes(loader: object) -> tuple[object, Sequence[str] | None]:
    dataset = getattr(loader, 'dataset', None)
    return dataset, (getattr(dataset, 'metainfo', None) or {}).get('classes')


def unwrapped(model: nn.Module) -> nn.Module:
    """A model without distributed or test-time wrappers."""
    while is_model_wrapper(model) or type(model).__name__.endswith('TTAModel'):
        model = cast(nn.Module, model.module)
    return model


def head_class_counts(model: nn.Module) -> Iterator[tuple[str, int]]:
    """Name and ``num_classes`` of every head of a model that classifies into the classes of the data.

    In a panoptic model of MMDetection that is only the fusion head; the others classify things or stuff.
    """
    fusion = getattr(model, 'panoptic_fusion_head', None)
    for name, module in model.named_modules() if fusion is None else [('panoptic_fusion_head', fusion)]:
        parts = name.split('.')
        if parts[-1].isdigit():
            parts.pop()
        if not parts or not parts[-1].endswith('head') or parts[-1] in OTHER_HEADS or set(OTHER_PARTS) & set(parts):
            continue
        count = getattr(module, 'num_classes', None)
        if isinstance(count, int) and count > 0 and type(module).__name__ not in OTHER_TYPES:
            yield name, count


@HOOKS.register_module()
class CheckpointFitHook(Hook):
    """Refuse a checkpoint that belongs to another model.

    For tests and when a run is resumed every parameter must be there in its shape. To start a training from, a
    checkpoint may have other heads, but half of the model's parameters must fit. A published classifier, which has no
    name for its backbone, is taken as backbone and head; this comes before other hooks, so that a moving average of
    the weights starts from it too.
    """

    priority = 'HIGHEST'

    def after_load_checkpoint(self, runner: Runner, checkpoint: dict) -> None:
        """Compare names and shapes before anything is loaded."""
        if runner._resume:
            check_stored_config(checkpoint, runner._load_from or runner.work_dir)
        model = unwrapped(runner.model)
        found: Mapping[str, Tensor] = find_state_dict(checkpoint, runner._load_from)
        renamed = fit_to_classifier(model, found)
        if renamed is not found:
            found = checkpoint['state_dict'] = renamed
        strict = runner._resume or getattr(runner, 'testing', False)
        report = compare(_convert_backbone(model, found, strict), model.state_dict())
        enough = len(report.loaded) * 2 >= len(model.state_dict())
        if not enough or (strict and (report.missing or report.mismatched)):
            source = runner._load_from or runner.work_dir
            remedy = 'Use the config that it was trained with, with the same number of classes'
            if not strict and not any(name.startswith('backbone.') for name in found):
                remedy += (
                    '; if it is of the backbone alone, such as a published file, name it by '
                    f"model.backbone.init_cfg=dict(type='Pretrained', checkpoint='{source}') in place of load_from"
                )
            raise CheckpointError(f"checkpoint '{source}' does not fit the model of this config: {report}. {remedy}")
        if report.missing or report.mismatched:
            runner.logger.warning(f'checkpoint: {report}')
        self._check_classes(runner, checkpoint)

    @staticmethod
    def _check_classes(runner: Runner, checkpoint: dict) -> None:
        trained = ((checkpoint.get('meta') or {}).get('dataset_meta') or {}).get('classes')
        testing = getattr(runner, 'testing', False)
        _, here = _dataset_and_classes(runner.test_dataloader if testing else runner.train_dataloader)
        if (runner._resume or testing) and trained is not None and here is not None and list(trained) != list(here):
            raise CheckpointError(
                f"checkpoint '{runner._load_from}' was trained on the classes {list(trained)}, the data set has "
                f'{list(here)}: give the class names in the order of training, for a COCO folder by '
                f'--cfg-options classes="[\'{trained[0]}\', ...]"'
            )


def _convert_backbone(model: nn.Module, weights: Mapping[str, Tensor], strict: bool) -> Conversion:
    """Weights after what the backbone makes of its part on loading, which also says why that does not fit."""
    backbone = getattr(model, 'backbone', None)
    own = part_of(weights, 'backbone.')
    hooks = getattr(backbone, '_load_state_dict_pre_hooks', {})
    if not own or not hooks:
        return Conversion(weights)
    metadata = getattr(own, '_metadata', {}).get('', {})
    for hook in hooks.values():
        hook(own, '', metadata, strict, [], [], [])
    rest = {name: value for name, value in weights.items() if not name.startswith('backbone.')}
    return Conversion({**rest, **{f'backbone.{name}': value for name, value in own.items()}})
