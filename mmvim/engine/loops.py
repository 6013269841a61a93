"""Checks that loops, samplers, schedules and checkpoints count in the same unit, and that a run can end."""

import random
from collections.abc import Iterable
from functools import partialmethod
from itertools import islice
from typing import Any

import numpy as np
import torch
from mmengine.dataset import DefaultSampler
from mmengine.hooks import CheckpointHook, Hook
from mmengine.runner import EpochBasedTrainLoop, IterBasedTrainLoop, Runner
from torch.utils.data import BatchSampler, DataLoader, IterableDataset, RandomSampler, SequentialSampler

from mmvim.errors import ConfigError
from mmvim.registry import HOOKS

FINITE = (DefaultSampler, RandomSampler, SequentialSampler)
PLAIN_BATCHES = (BatchSampler, 'AspectRatioBatchSampler', 'TrackAspectRatioBatchSampler')  # end with their sampler


@HOOKS.register_module()
class LoopHook(Hook):
    """Refuse a loop that would not end, and schedules or checkpoints that would not happen.

    - An epoch, a validation or a test with a sampler that has no end.
    - Schedules and checkpoints that count epochs in a loop that counts iterations.
    - A run that saves nothing.

    A validation or a schedule that begins after the end of the run is a warning.
    """

    priority = 'VERY_HIGH'

    def before_train(self, runner: Runner) -> None:
        """Check the training loop, and the validation within it."""
        loop = runner.train_loop
        if isinstance(loop, EpochBasedTrainLoop):
            check_end(loop.dataloader, 'train_dataloader', 'an epoch')
        if runner.val_loop is not None:
            check_end(runner.val_loop.dataloader, 'val_dataloader', 'the validation')
        if isinstance(loop, EpochBasedTrainLoop | IterBasedTrainLoop):
            by_epoch = isinstance(loop, EpochBasedTrainLoop)
            _check_schedules(runner, by_epoch)
            _check_checkpoints(runner, by_epoch)
            _check_validation(runner, by_epoch)
            for hook in runner.hooks:
                if getattr(hook, 'by_epoch', False) is True and not by_epoch:
                    runner.logger.warning(f'{type(hook).__name__} counts epochs, but {_loop(runner)} has none')

    def check(self, runner: Runner, key: str, what: str) -> None:
        """Check the data loader of this name."""
        check_end(getattr(runner, key), key, what)

    before_val = partialmethod(check, key='val_dataloader', what='the validation')
    before_test = partialmethod(check, key='test_dataloader', what='the test')


def check_end(loader: DataLoader, key: str, what: str) -> None:
    """Refuse a data loader that does not end.

    Raises:
        ConfigError: naming its sampler.
    """
    batches = getattr(loader, 'batch_sampler', None)
    if batches is None or isinstance(loader.dataset, IterableDataset) or not is_endless(batches):
        return
    sampler = batches
    while not _is_plain(sampler, FINITE) and getattr(sampler, 'sampler', None) is not None:
        sampler = sampler.sampler
    name = type(batches if _is_plain(sampler, FINITE) else sampler).__name__
    other = ' and shuffle=False' if what != 'an epoch' else ", or train_cfg.type='IterBasedTrainLoop' with max_iters"
    raise ConfigError(
        f"{key} draws from {name}, which has no end, so {what} would never end: set {key}.sampler.type='DefaultSampler'"
        f'{other}'
    )


def is_endless(batches: Any) -> bool:
    """Whether a sampler, of indices or batches, goes on after what its length says, twice over.

    Those that are known to end are not asked. Global random states are as before.
    """
    if _is_plain(batches, PLAIN_BATCHES):
        return is_endless(batches.sampler)
    if _is_plain(batches, FINITE):
        return False
    states = random.getstate(), np.random.get_state()
    most = 2 * len(batches) + 16
    try:
        with torch.random.fork_rng(devices=[]):
            return sum(1 for _ in islice(iter(batches), most)) == most
    finally:
        random.setstate(states[0])
        np.random.set_state(states[1])


def _is_plain(sampler: object, known: Iterable) -> bool:
    """Whether an object is of one of these classes or names of classes itself, not of a derived class."""
    return type(sampler) in known or type(sampler).__name__ in known


def _check_schedules(runner: Runner, by_epoch: bool) -> None:
    schedulers = runner.param_schedulers or []
    grouped = schedulers.values() if isinstance(schedulers, dict) else [schedulers]
    for i, scheduler in ((i, scheduler) for group in grouped for i, scheduler in enumerate(group)):
        name = f'param_scheduler.{i} ({type(scheduler).__name__})'
        if scheduler.by_epoch and not by_epoch:
            raise ConfigError(
                f'{name} counts epochs, but {_loop(runner)} has none, so it would never change anything: set '
                f'param_scheduler.{i}.by_epoch=False and its begin and end in iterations'
            )
        length = runner.max_epochs if scheduler.by_epoch else runner.max_iters
        if scheduler.begin >= length:
            unit = 'epochs' if scheduler.by_epoch else 'iterations'
            runner.logger.warning(
                f'{name} begins after {scheduler.begin} {unit}, but the run ends after {length}: it changes nothing'
            )


def _check_checkpoints(runner: Runner, by_epoch: bool) -> None:
    saving = False
    for hook in (hook for hook in runner.hooks if isinstance(hook, CheckpointHook)):
        if hook.by_epoch and not by_epoch:
            raise ConfigError(
                f'default_hooks.checkpoint counts epochs, but {_loop(runner)} has none, so nothing would be saved '
                'before the end: set default_hooks.checkpoint.by_epoch=False and interval in iterations'
            )
        first = hook.save_begin or hook.interval
        length = runner.max_epochs if hook.by_epoch else runner.max_iters
        saving |= hook.save_last or hook.save_best is not None or (hook.interval > 0 and first <= length)
        if not saving:
            unit = 'epochs' if hook.by_epoch else 'iterations'
            raise ConfigError(
                f'default_hooks.checkpoint saves every {hook.interval} {unit}, but the run ends after {length}, and '
                'save_last=False: nothing would be saved; lower default_hooks.checkpoint.interval'
            )


def _check_validation(runner: Runner, by_epoch: bool) -> None:
    begin = getattr(runner.train_loop, 'val_begin', 1)
    length, unit = (runner.max_epochs, 'epochs') if by_epoch else (runner.max_iters, 'iterations')
    if runner.val_loop is not None and begin > length:
        runner.logger.warning(
            f'train_cfg.val_begin={begin}, but the run ends after {length} {unit}: nothing will be validated'
        )


def _loop(runner: Runner) -> str:
    return type(runner.train_loop).__name__
