"""Checks of a classifier's data before a run."""

import time
from collections.abc import Sequence
from typing import Any

from mmengine.hooks import Hook
from mmengine.runner import Runner

from mmvim.datasets.pipelines import plain_datasets
from mmvim.engine.hooks import head_class_counts, unwrapped
from mmvim.errors import DataError
from mmvim.registry import HOOKS

SECONDS = 5.0  # for reading labels, at most


@HOOKS.register_module()
class ClassLabelHook(Hook):
    """Refuse a classifier's data whose labels are no classes of the head, and validation data with other classes.

    With folders of other names, the same index would mean another class in validation.
    """

    def before_train(self, runner: Runner) -> None:
        """Compare training and validation data with the head and with each other."""
        loaders = dict(train_dataloader=runner.train_dataloader)
        if runner.val_loop is not None:
            loaders['val_dataloader'] = runner.val_dataloader
        self._check(runner, loaders)

    def before_test(self, runner: Runner) -> None:
        """Compare test data with the head."""
        self._check(runner, dict(test_dataloader=runner.test_dataloader))

    @staticmethod
    def _check(runner: Runner, loaders: dict[str, Any]) -> None:
        counts = [count for name, count in head_class_counts(unwrapped(runner.model)) if name == 'head']
        if runner.cfg.get('default_scope') != 'mmpretrain' or not counts:
            return
        known: dict[str, list] = {}
        for key, loader in loaders.items():
            dataset = getattr(loader, 'dataset', None)
            check_labels(dataset, key, counts[0])
            classes = (getattr(dataset, 'metainfo', None) or {}).get('classes')
            if classes:
                known[key] = list(classes)
        train, val = known.get('train_dataloader'), known.get('val_dataloader')
        if train and val and train != val:
            raise DataError(
                f'val_dataloader has the classes {_shown(val)}, train_dataloader {_shown(train)}: give both data sets '
                'the same classes in the same order (metainfo.classes), with a folder for each; '
                'mmvim.ClassFolderDataset needs no folder for a class without validation images'
            )


def _shown(classes: Sequence) -> str:
    return f'{classes[:5]}{" ..." if len(classes) > 5 else ""} ({len(classes)})'


def check_labels(dataset: Any, loader: str, count: int) -> None:
    """Refuse a data set with a label that is no index of a class, as far as time allows to look.

    Raises:
        DataError: naming the first such image.
    """
    end = time.monotonic() + SECONDS
    for part in plain_datasets(dataset):
        if not hasattr(part, 'get_data_info'):
            continue
        for i in range(len(part)):
            if time.monotonic() > end:
                return
            sample = part.get_data_info(i)
            label = sample.get('gt_label')
            for value in label if isinstance(label, list | tuple) else [label]:
                if isinstance(value, int) and not 0 <= value < count:
                    raise DataError(
                        f"{loader}: image '{sample.get('img_path')}' has the label {value}, but model.head has "
                        f'num_classes={count}: labels are 0 to {count - 1}; correct the annotation file or num_classes'
                    )
