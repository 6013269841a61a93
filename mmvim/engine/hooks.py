"""Checks at the points where a mistake in data, config or checkpoint would otherwise pass unnoticed."""

from collections.abc import Iterable

from mmengine.hooks import Hook
from mmengine.model import is_model_wrapper
from mmengine.runner import Runner
from torch import Tensor, nn

from mmvim.errors import CheckpointError, ConfigError
from mmvim.registry import HOOKS


@HOOKS.register_module()
class ClassCountHook(Hook):
    """Refuse a data set whose classes are not as many as a head of the model has."""

    def before_train(self, runner: Runner) -> None:
        self._check(runner, runner.train_dataloader, 'train_dataloader')

    def before_val(self, runner: Runner) -> None:
        self._check(runner, runner.val_dataloader, 'val_dataloader')

    def before_test(self, runner: Runner) -> None:
        self._check(runner, runner.test_dataloader, 'test_dataloader')

    @staticmethod
    def _check(runner: Runner, loader, key: str) -> None:
        dataset = getattr(loader, 'dataset', None)
        classes = (getattr(dataset, 'metainfo', None) or {}).get('classes')
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


def unwrapped(model: nn.Module) -> nn.Module:
    """A model without distributed or test-time wrappers."""
    while is_model_wrapper(model) or type(model).__name__.endswith('TTAModel'):
        model = model.module
    return model


def head_class_counts(model: nn.Module) -> Iterable[tuple[str, int]]:
    """Name and ``num_classes`` of every head of a model that tells the classes of the data apart."""
    for name, module in model.named_modules():
        parts = name.split('.')
        if parts[-1].isdigit():
            parts.pop()
        if not parts or not parts[-1].endswith('head') or parts[-1] == 'rpn_head' or 'backbone' in parts:
            continue
        count = getattr(module, 'num_classes', None)
        if isinstance(count, int) and count > 0:
            yield name, count


@HOOKS.register_module()
class CheckpointFitHook(Hook):
    """Refuse a checkpoint that belongs to another model.

    For tests and when a run is resumed every parameter must be there in its shape. To start a training from, a
    checkpoint may have other heads, but half of the model's parameters must fit.
    """

    priority = 'LOWEST'

    def after_load_checkpoint(self, runner: Runner, checkpoint: dict) -> None:
        """Compare names and shapes before anything is loaded."""
        found = checkpoint.get('state_dict', checkpoint)
        model = unwrapped(runner.model)
        wanted = model.state_dict()
        found = {
            name.removeprefix('module.'): value.shape for name, value in found.items() if isinstance(value, Tensor)
        }
        lacking = [name for name in wanted if name not in found]
        different = [name for name in wanted if name in found and found[name] != wanted[name].shape]
        surplus = [name for name in found if name not in wanted]
        fitting = len(wanted) - len(lacking) - len(different)
        told = [
            f'{len(names)} {what}, for example {names[0]}{shapes(names[0])}'
            for what, names, shapes in (
                ('missing', lacking, lambda name: ''),
                (
                    'of another shape',
                    different,
                    lambda name: f' ({tuple(found[name])} instead of {tuple(wanted[name].shape)})',
                ),
                ('not in the model', surplus, lambda name: ''),
            )
            if names
        ]
        strict = runner._resume or getattr(runner, 'testing', False)
        if fitting * 2 < len(wanted) or (strict and (lacking or different)):
            raise CheckpointError(
                f"checkpoint '{runner._load_from or 'of the work_dir'}' does not fit the model of this config: of its "
                f'{len(wanted)} parameters and buffers {fitting} fit ({"; ".join(told)}). Use the config that the '
                'checkpoint was trained with, or the same num_classes'
            )
        if lacking or different:
            runner.logger.warning(f'checkpoint: {fitting} of {len(wanted)} parameters fit; {"; ".join(told)}')
        self._check_classes(runner, checkpoint)

    @staticmethod
    def _check_classes(runner: Runner, checkpoint: dict) -> None:
        trained = ((checkpoint.get('meta') or {}).get('dataset_meta') or {}).get('classes')
        loader = runner.test_dataloader if getattr(runner, 'testing', False) else runner.train_dataloader
        here = (getattr(getattr(loader, 'dataset', None), 'metainfo', None) or {}).get('classes')
        strict = runner._resume or getattr(runner, 'testing', False)
        if strict and trained is not None and here is not None and list(trained) != list(here):
            raise CheckpointError(
                f"checkpoint '{runner._load_from}' was trained on the classes {list(trained)}, the data set has "
                f'{list(here)}: give the class names in the order of training, for a COCO folder by '
                f'--cfg-options classes="[\'{trained[0]}\', ...]"'
            )
