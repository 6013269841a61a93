"""Random states that follow from the seed and the position in the run, so that a resumed run draws what it would have.

Nothing is saved: each iteration, each batch and each pass of a sampler has a random stream of its own. A validation in
between, the number of workers and how far they run ahead change nothing.
"""

import copy
import random
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import numpy as np
import torch
from mmengine.dist import get_rank
from mmengine.hooks import Hook
from mmengine.runner import EpochBasedTrainLoop as _EpochBasedTrainLoop
from mmengine.runner import IterBasedTrainLoop, Runner
from mmengine.runner.base_loop import BaseLoop
from mmengine.runner.loops import _InfiniteDataloaderIterator
from torch.utils.data import DataLoader, Dataset, IterableDataset

from mmvim.registry import HOOKS, LOOPS

ITERATION, EPOCH, VALIDATION, BATCH, SAMPLER = range(5)  # what a random stream is for


def seed_from(*numbers: int) -> None:
    """Set the random states of Python, NumPy and torch to those that belong to these numbers, none of them negative."""
    state = np.random.SeedSequence(numbers).generate_state(10)
    random.seed(state[:4].tobytes())
    np.random.seed(state[4:8])
    seed = int.from_bytes(state[8:].tobytes(), 'little') >> 1
    torch.random.default_generator.manual_seed(seed)
    for device in (torch.cuda, torch.xpu):  # torch.manual_seed takes a millisecond where there is no GPU
        if device.is_initialized():
            device.manual_seed_all(seed)


@HOOKS.register_module()
class RandomStateHook(Hook):
    """Start a random stream before every iteration, epoch and validation."""

    priority = 'HIGHEST'

    def before_train_epoch(self, runner: Runner) -> None:
        """What hooks draw between two epochs."""
        seed_from(runner.seed, EPOCH, runner.iter)

    def before_train_iter(self, runner: Runner, batch_idx: int, data_batch: dict | None = None) -> None:
        """What model and losses draw, such as dropout, mixup and the sampling of boxes."""
        seed_from(runner.seed, ITERATION, runner.iter)

    def before_val_epoch(self, runner: Runner) -> None:
        """What a validation draws."""
        seed_from(runner.seed, VALIDATION, runner.iter)


class _OwnStates:
    """Random states of a part that neither disturbs others nor is disturbed."""

    def __init__(self, *numbers: int) -> None:
        outside = self._get()
        state = np.random.SeedSequence(numbers).generate_state(10)
        random.seed(state[:4].tobytes())
        np.random.seed(state[4:8])
        torch.random.default_generator.manual_seed(int(state[8]))
        self.states = self._get()
        self._set(outside)

    @staticmethod
    def _get() -> tuple:
        return random.getstate(), np.random.get_state(), torch.get_rng_state()

    @staticmethod
    def _set(states: tuple) -> None:
        random.setstate(states[0])
        np.random.set_state(states[1])
        torch.set_rng_state(states[2])

    @contextmanager
    def active(self) -> Iterator[None]:
        outside = self._get()
        self._set(self.states)
        try:
            yield
        finally:
            self.states = self._get()
            self._set(outside)


class _Batch(list):
    """The indices of a batch, with its number since the run began."""

    number: int


class _SeededDataset(Dataset):
    """A data set as a loader's workers see it: what a batch draws depends on its number alone."""

    def __init__(self, dataset: Any, key: tuple[int, ...]) -> None:
        self.dataset = dataset
        self.key = key

    def __getattr__(self, name: str) -> Any:
        if name.startswith('__') or name == 'dataset':
            raise AttributeError(name)
        return getattr(self.dataset, name)

    def __getitems__(self, batch: _Batch) -> list:
        seed_from(*self.key, BATCH, batch.number)
        several = getattr(self.dataset, '__getitems__', None)
        return several(batch) if several else [self.dataset[index] for index in batch]


class Batches:
    """The batches of a sampler with their numbers, from any one on.

    Args:
        batches: a batch sampler.
        key: numbers that its random streams belong to: seed and rank.
        position: number of the next batch, counted from the start of the run.
    """

    def __init__(self, batches: Any, key: tuple[int, ...], position: Callable[[], int]) -> None:
        self.batches = batches
        self.key = key
        self.position = position
        self.pass_number = 0
        self.to_skip = 0
        self.open: tuple[Iterator, _OwnStates] | None = None

    def __len__(self) -> int:
        return len(self.batches)

    def go_to(self, number: int, set_epoch: Callable[[int], None]) -> None:
        """Let the next batch be that of this number, where one pass comes after the other; no data are loaded.

        Args:
            number: how many batches the run has taken.
            set_epoch: tells the sampler the number of the pass.
        """
        batches, states = self._start()
        with states.active():
            taken = sum(1 for _ in zip(range(number), batches, strict=False))
        if taken == number:
            self.open = batches, states
        elif taken:
            self.pass_number, self.to_skip = divmod(number, taken)
            set_epoch(self.pass_number)

    def _start(self) -> tuple[Iterator, _OwnStates]:
        states = _OwnStates(*self.key, SAMPLER, self.pass_number)
        with states.active():
            return iter(self.batches), states

    def __iter__(self) -> Iterator[_Batch]:
        batches, states = self.open or self._start()
        skip, self.open, self.to_skip = self.to_skip, None, 0
        number = self.position()
        with states.active():
            for _ in range(skip):
                next(batches, None)
        while True:
            with states.active():
                indices: Sequence | None = next(batches, None)
            if indices is None:
                self.pass_number += 1
                return
            batch = _Batch(indices)
            batch.number = number
            number += 1
            yield batch


class ResumableLoader(DataLoader):
    """A data loader whose batches depend on seed and position alone; see `make_resumable`."""

    numbered: Batches

    @property
    def _index_sampler(self) -> Batches:
        return self.numbered

    def _get_iterator(self) -> Any:
        view = copy.copy(self)
        view.__dict__['dataset'] = _SeededDataset(self.dataset, self.numbered.key)
        return DataLoader._get_iterator(view)

    def set_epoch(self, epoch: int) -> None:
        """Tell the sampler the number of the pass, where mmengine does."""
        for sampler in (self.sampler, getattr(self.batch_sampler, 'sampler', None)):
            if hasattr(sampler, 'set_epoch'):
                return sampler.set_epoch(epoch)


class _SkippingIterator(_InfiniteDataloaderIterator):
    """mmengine's iterator over several passes, which skips by any sampler without loading data."""

    def skip_iter(self, num_iters: int) -> None:
        self._dataloader.numbered.go_to(num_iters, self._dataloader.set_epoch)
        self._epoch = self._dataloader.numbered.pass_number


@LOOPS.register_module()
class EpochBasedTrainLoop(_EpochBasedTrainLoop):
    """mmengine's loop, which counts the batches of a resumed epoch from where it goes on."""

    def run_epoch(self) -> None:
        """Iterate the rest of an epoch."""
        self.runner.call_hook('before_train_epoch')
        self.runner.model.train()
        first = 0
        if isinstance(self.dataloader, ResumableLoader):
            first, self.dataloader.numbered.pass_number = self.dataloader.numbered.to_skip, self._epoch
        for index, batch in enumerate(self.dataloader, start=first):
            self.run_iter(index, batch)
        self.runner.call_hook('after_train_epoch')
        self._epoch += 1


def make_resumable(loop: BaseLoop, seed: int) -> None:
    """Let a training loop's data depend on seed and position alone, if torch's DataLoader loads them by index.

    Args:
        loop: the loop, with its data loader. The loader keeps its attributes.
        seed: the seed of the run.
    """
    loader = loop.dataloader
    if type(loader) is not DataLoader or loader.batch_sampler is None or isinstance(loader.dataset, IterableDataset):
        return
    numbered = Batches(loader.batch_sampler, (seed, get_rank()), lambda: loop.iter)
    loader.__class__ = ResumableLoader  # not a new one: loaders have arguments that they do not keep
    loader.numbered = numbered
    if isinstance(loop, IterBasedTrainLoop):
        loop.dataloader_iterator = _SkippingIterator(loader)
