"""Optimiser and schedule of a resumed run: their state comes from the checkpoint, their settings from the config."""

import math
import warnings
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

import torch
from mmengine.dist import get_world_size
from mmengine.hooks import EarlyStoppingHook
from mmengine.optim import OptimWrapper
from mmengine.runner import EpochBasedTrainLoop, Runner

from mmvim.engine.resume_choice import REMEDY
from mmvim.errors import CheckpointError, first_line

# of a scheduler's state, what says where it stands; the rest is how it was configured
POSITION = {'last_step', 'last_epoch', '_global_step', '_last_value', 'base_values', 'best', 'num_bad_epochs'}
POSITION |= {'cooldown_counter', 'verbose'}


def early_stopping_hooks(runner: Runner) -> list[EarlyStoppingHook]:
    """The hooks that may end a training early."""
    return [hook for hook in runner.hooks if isinstance(hook, EarlyStoppingHook)]


def facts(runner: Runner) -> dict[str, Any]:
    """What a checkpoint keeps of its run, beside what mmengine does; numbers and text only."""
    loop, wrapper = runner.train_loop, runner.optim_wrapper
    by_epoch = isinstance(loop, EpochBasedTrainLoop)
    return dict(
        optimizer=_optimizer_name(wrapper),
        batch_size=batch_size_of(loop.dataloader),
        processes=get_world_size(),
        accumulative_counts=getattr(wrapper, '_accumulative_counts', 1),
        max_epochs=loop.max_epochs if by_epoch else None,
        max_iters=None if by_epoch else getattr(loop, 'max_iters', None),
        epoch_length=len(loop.dataloader) if by_epoch else None,
        schedulers=[type(scheduler).__name__ for scheduler in schedulers_of(runner)],
        early_stopping=[(float(hook.best_score), hook.wait_count) for hook in early_stopping_hooks(runner)],
    )


def _optimizer_name(wrapper: Any) -> str | None:
    return type(wrapper.optimizer).__name__ if isinstance(wrapper, OptimWrapper) else None


def batch_size_of(loader: Any) -> Any:
    """The batch size of a loader or of its batch sampler."""
    return getattr(loader, 'batch_size', None) or getattr(getattr(loader, 'batch_sampler', None), 'batch_size', None)


def schedulers_of(runner: Runner) -> list:
    """The parameter schedulers, of all optimisers."""
    schedulers = runner.param_schedulers
    if isinstance(schedulers, dict):
        return [scheduler for part in schedulers.values() for scheduler in part]
    return list(schedulers or [])


def resume_optimizer(
    runner: Runner, checkpoint: Mapping[str, Any], run: Mapping[str, Any], path: str, schedulers: bool
) -> None:
    """Take over the state of the optimiser, and that of the schedulers or what the config makes of it.

    Args:
        runner: a runner whose optimiser and schedulers are at their beginning.
        checkpoint: its content.
        run: facts of the run that saved it.
        path: the file, for messages.
        schedulers: whether to compare the schedulers too.

    Raises:
        CheckpointError: if the optimiser is another one.
    """
    wrapper = runner.optim_wrapper
    here, there = _optimizer_name(wrapper), run.get('optimizer')
    kept = checkpoint['optimizer']
    fresh = [dict(group) for group in wrapper.param_groups] if here else []
    other = set(fresh[0]) ^ set((kept.get('param_groups') or fresh)[0]) if fresh else set()
    telling = {'betas', 'momentum', 'alpha', 'rho', 'lambd', 'lr_decay'} & other
    if (there and here != there) or (not there and telling):
        was = there or f'another one, with or without {", ".join(sorted(telling))}'
        raise CheckpointError(
            f"checkpoint '{path}' cannot be resumed: its optimiser is {was}, the config's {here}: {REMEDY}"
        )
    try:
        wrapper.load_state_dict(kept)
    except (ValueError, KeyError, RuntimeError, TypeError, AttributeError) as error:
        raise CheckpointError(
            f"checkpoint '{path}' cannot be resumed: the state of its optimiser does not fit ({first_line(error)}): "
            f'{REMEDY}'
        ) from None
    states = flat(checkpoint.get('param_schedulers')) if schedulers else []
    if not fresh:  # several optimisers
        _load(schedulers_of(runner), states)
        return
    changes = _changes(fresh, wrapper.param_groups)
    if schedulers:
        changes += _schedule_changes(runner, states, run)
    loop = runner.train_loop
    moved = run.get('epoch_length') not in (None, len(loop.dataloader)) and run.get('max_epochs')
    for name in ('max_iters', 'max_epochs', 'accumulative_counts'):
        now = facts(runner)[name]
        if name in run and run[name] != now:
            changes.append(f'{name} was {run[name]} and is {now}')
    if not changes and not moved:
        _load(schedulers_of(runner), states)
        return
    by_metric = any(getattr(scheduler, 'need_val_args', False) for scheduler in schedulers_of(runner))
    rates = (
        'learning rates and schedule stay those of the checkpoint, as they follow a metric'
        if by_metric
        else f'learning rates are those that it gives at iteration {loop.iter} of its own schedule'
    )
    runner.logger.warning(
        f'--resume: the config differs from that of the checkpoint ({"; ".join(changes[:6]) or "length of an epoch"}): '
        f'the config wins; {rates}'
    )
    for group, settings in zip(wrapper.param_groups, fresh, strict=True):
        kept_names = {'params', *(name for name in settings if by_metric and _scheduled(name, settings))}
        group.update({name: value for name, value in settings.items() if name not in kept_names})
    if by_metric:
        _load(schedulers_of(runner), [{name: state[name] for name in state.keys() & POSITION} for state in states])
    else:
        replay(schedulers_of(runner), loop.iter, loop.epoch, loop.dataloader)


def _scheduled(name: str, settings: Mapping) -> bool:
    return name in ('lr', 'momentum', 'betas') or name.startswith('initial_') or f'initial_{name}' in settings


def _load(schedulers: Iterable, states: Iterable[Mapping]) -> None:
    for scheduler, state in zip(schedulers, states, strict=False):
        scheduler.load_state_dict(state)


def flat(states: Any) -> list:
    """The schedulers' states in a checkpoint, of all optimisers."""
    if isinstance(states, Mapping):
        return [state for part in states.values() for state in part]
    return list(states or [])


def _changes(fresh: Sequence[Mapping], kept: Sequence[Mapping]) -> list[str]:
    """In which settings parameter groups differ, apart from what a schedule makes of them."""
    changes: dict[str, str] = {}
    for here, there in zip(fresh, kept, strict=True):
        for name in here:
            if name == 'params' or name.startswith('initial_') or name not in there:
                continue
            now, was = (group.get(f'initial_{name}', group[name]) for group in (here, there))
            if not _same(now, was):
                changes.setdefault(name, f'{name} was {was} and is {now}')
    return list(changes.values())


def _same(one: Any, other: Any) -> bool:
    if isinstance(one, torch.Tensor) or isinstance(other, torch.Tensor):
        return bool(torch.equal(torch.as_tensor(one), torch.as_tensor(other)))
    listed = isinstance(one, list | tuple) and isinstance(other, list | tuple)
    return list(one) == list(other) if listed else one == other


def _schedule_changes(runner: Runner, states: list[Mapping], run: Mapping[str, Any]) -> list[str]:
    """How the config's schedule differs from the checkpoint's."""
    schedulers = schedulers_of(runner)
    kinds = [type(scheduler).__name__ for scheduler in schedulers]
    if len(states) != len(schedulers) or run.get('schedulers', kinds) != kinds:
        return [f'param_scheduler was {run.get("schedulers") or f"{len(states)} schedulers"} and is {kinds}']
    changes = []
    for kind, scheduler, was in zip(kinds, schedulers, states, strict=True):
        now = scheduler.state_dict()
        for name in now.keys() & was.keys() - POSITION:
            if not _same(now[name], was[name]):
                changes.append(f'{kind}.{name} was {was[name]} and is {now[name]}')
    return sorted(changes)


def replay(schedulers: Sequence, iteration: int, epoch: int, loader: Any) -> None:
    """Step schedulers that are at their beginning to an iteration, in the order in which a run steps them.

    Args:
        schedulers: those of the config.
        iteration: iterations that are over.
        epoch: epochs that are over.
        loader: the training data, for the length of an epoch.
    """
    by_iteration = [scheduler for scheduler in schedulers if not scheduler.by_epoch]
    by_epoch = [scheduler for scheduler in schedulers if scheduler.by_epoch]
    length = len(loader) if epoch else math.inf
    with warnings.catch_warnings():
        warnings.simplefilter('ignore')  # a step of the scheduler without one of the optimiser
        for now in range(1, iteration + 1):
            for scheduler in by_iteration:
                scheduler.step()
            if now % length == 0 and now // length <= epoch:
                for scheduler in by_epoch:
                    scheduler.step()
