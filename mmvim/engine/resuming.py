"""Go on with a run that was interrupted as if it had not been."""

import math
import warnings
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from mmengine.dist import broadcast_object_list, get_rank, get_world_size
from mmengine.hooks import EarlyStoppingHook, Hook
from mmengine.optim import OptimWrapper
from mmengine.runner import EpochBasedTrainLoop, Runner
from mmengine.runner.checkpoint import _load_checkpoint

from mmvim.engine.hooks import unwrapped
from mmvim.engine.randomness import ResumableLoader
from mmvim.engine.resume_choice import REMEDY, Found, check_intact, check_resumable, newest_checkpoint
from mmvim.errors import CheckpointError, ConfigError
from mmvim.registry import HOOKS
from mmvim.weights import Conversion, compare
from mmvim.weights.reading import find_state_dict

KEY = 'mmvim_run'  # entry of a checkpoint
# of a scheduler's state, what says where it stands; the rest is how it was configured
POSITION = {'last_step', 'last_epoch', '_global_step', '_last_value', 'base_values', 'best', 'num_bad_epochs'}
POSITION |= {'cooldown_counter', 'verbose'}
# parts of the hosts that keep something from one iteration to the next which no checkpoint holds
FORGETFUL = ('CachedMosaic', 'CachedMixUp', 'BatchSyncRandomResize', 'DynamicRoIHead')


@HOOKS.register_module()
class ResumeHook(Hook):
    """Keep in checkpoints what a resumed run compares and continues, and validate what a killed run did not."""

    priority = 'LOWEST'
    validated = -1

    def before_save_checkpoint(self, runner: Runner, checkpoint: dict) -> None:
        """Add the run's facts, and gradients that wait for more of them to be added."""
        if 'optimizer' not in checkpoint:
            return
        checkpoint[KEY] = facts(runner)
        checkpoint[KEY]['validated'] = -1 if _early_stopping(runner) else self.validated
        wrapper = runner.optim_wrapper
        if _accumulating(wrapper, getattr(wrapper, '_inner_count', 0)) and get_world_size() == 1:
            named = unwrapped(runner.model).named_parameters()
            checkpoint[KEY]['gradients'] = {name: p.grad.cpu() for name, p in named if p.grad is not None}

    def before_train(self, runner: Runner) -> None:
        """Validate, where the unbroken run would have done so after the checkpoint was saved."""
        loop, pending = runner.train_loop, getattr(runner, 'validated', None)
        if pending is None or runner.val_loop is None or pending == loop.iter or loop.iter == 0:
            return
        loop._decide_current_val_interval()
        by_epoch = isinstance(loop, EpochBasedTrainLoop)
        now, last = (loop.epoch, loop.max_epochs) if by_epoch else (loop.iter, loop.max_iters)
        inside = by_epoch and isinstance(loop.dataloader, ResumableLoader) and loop.dataloader.numbered.to_skip
        if not inside and now >= loop.val_begin and (now % loop.val_interval == 0 or now == last):
            runner.val_loop.run()

    def after_val_epoch(self, runner: Runner, metrics: dict | None = None) -> None:
        """Note that the weights of this iteration were validated."""
        self.validated = runner.iter


def _early_stopping(runner: Runner) -> list[EarlyStoppingHook]:
    return [hook for hook in runner.hooks if isinstance(hook, EarlyStoppingHook)]


def _accumulating(wrapper: Any, count: int) -> bool:
    """Whether gradients of earlier iterations wait for the next step of the optimiser."""
    return (
        isinstance(wrapper, OptimWrapper) and count % wrapper._accumulative_counts != 0 and count != wrapper._max_counts
    )


def facts(runner: Runner) -> dict[str, Any]:
    """What a checkpoint keeps of its run, beside what mmengine does; numbers and text only."""
    loop, wrapper = runner.train_loop, runner.optim_wrapper
    by_epoch = isinstance(loop, EpochBasedTrainLoop)
    return dict(
        optimizer=_optimizer_name(wrapper),
        batch_size=_batch_size(loop.dataloader),
        processes=get_world_size(),
        accumulative_counts=getattr(wrapper, '_accumulative_counts', 1),
        max_epochs=loop.max_epochs if by_epoch else None,
        max_iters=None if by_epoch else getattr(loop, 'max_iters', None),
        epoch_length=len(loop.dataloader) if by_epoch else None,
        schedulers=[type(scheduler).__name__ for scheduler in _schedulers(runner)],
        early_stopping=[(hook.best_score, hook.wait_count) for hook in _early_stopping(runner)],
    )


def _optimizer_name(wrapper: Any) -> str | None:
    return type(wrapper.optimizer).__name__ if isinstance(wrapper, OptimWrapper) else None


def _batch_size(loader: Any) -> Any:
    return getattr(loader, 'batch_size', None) or getattr(getattr(loader, 'batch_sampler', None), 'batch_size', None)


def _schedulers(runner: Runner) -> list:
    schedulers = runner.param_schedulers
    if isinstance(schedulers, dict):
        return [scheduler for part in schedulers.values() for scheduler in part]
    return list(schedulers or [])


def settle(runner: Runner) -> int | None:
    """Decide what a run that is asked to resume goes on from, before any part with a seed is built.

    Returns:
        The seed of the run that it goes on with.

    Raises:
        CheckpointError: if the given checkpoint, or each in the work directory, cannot be resumed from.
    """
    if not runner._resume:
        return None
    decided: list = [None]
    if get_rank() == 0:
        try:
            decided = [_choose(runner)]
        except Exception as error:  # the other processes wait for an answer
            decided = [error]
    broadcast_object_list(decided)
    if isinstance(decided[0], Exception):
        raise decided[0]
    path, seed = decided[0]
    if path is None:
        runner.logger.warning(
            f"--resume: no checkpoint in work directory '{runner.work_dir}': training starts from the beginning"
        )
        runner._resume = False
    else:
        runner._load_from = path
        runner._resume = True
    return seed


def _choose(runner: Runner) -> tuple[str | None, int | None]:
    given = runner._load_from if runner._resume != 'auto' else None
    with_schedulers = runner.param_schedulers is not None
    found: Found | None
    if given is not None:  # CheckpointFitHook looks at the weights
        if '://' in given:
            found = Found(Path(given), _load_checkpoint(given, map_location='cpu'))
        else:
            check_intact(given)
            found = Found.read(given)
        check_resumable(given, found.content, with_schedulers)
    else:
        model = unwrapped(runner.model)

        def wanted(found: Found) -> None:
            check_resumable(found.path, found.content, with_schedulers)
            report = compare(Conversion(find_state_dict(found.content, found.path)), model.state_dict())
            if report.missing or report.mismatched:
                raise CheckpointError(f"'{found.path}' does not fit the model of this config, {report}: {REMEDY}")

        found, skipped = newest_checkpoint(_folders(runner), wanted)
        for line in skipped:
            runner.logger.warning(f'--resume: skipped {line}')
        if found is None:
            return None, None
        runner.logger.info(f"--resume: goes on from '{found.path}', the newest checkpoint that can be used")
    return given or str(found.path), found.content['meta'].get('seed')


def _folders(runner: Runner) -> list[str]:
    """Where the run keeps its checkpoints."""
    hook = next((hook for hook in runner.hooks if type(hook).__name__ == 'CheckpointHook'), None)
    elsewhere = getattr(hook, 'out_dir', None)
    folders = [runner.work_dir]
    if elsewhere and '://' not in str(elsewhere):
        folders.append(f'{elsewhere}/{runner.work_dir.rstrip("/").rpartition("/")[2]}')
    return folders


def resume_run(runner: Runner, checkpoint: dict, path: str, optimizer: bool = True, schedulers: bool = True) -> None:
    """Continue from a checkpoint whose weights are loaded.

    What the config says wins over what the checkpoint's run was configured with, and each difference is named.

    Args:
        runner: a runner with its training loop.
        checkpoint: its content.
        path: the file, for messages.
        optimizer: whether to take over the optimiser's state.
        schedulers: whether to take over the parameter schedulers' state.

    Raises:
        CheckpointError: if the checkpoint lacks a part, or its optimiser is another.
        ConfigError: if the run of this config has ended before.
    """
    check_resumable(path, checkpoint if optimizer else {**checkpoint, 'optimizer': {}}, False)
    loop, meta = runner.train_loop, checkpoint['meta']
    run = checkpoint.get(KEY) or {}
    loop._epoch, loop._iter = meta['epoch'], meta['iter']
    _place_data(runner, run)
    by_epoch = isinstance(loop, EpochBasedTrainLoop)
    done, end, name = (loop.epoch, loop.max_epochs, 'epochs') if by_epoch else (loop.iter, loop.max_iters, 'iters')
    if done > end:
        raise ConfigError(
            f"checkpoint '{path}' was saved after {done} {name}, but train_cfg.max_{name} is {end}: "
            f'raise max_{name}, or resume from an earlier checkpoint'
        )
    if 'message_hub' in checkpoint:
        runner.message_hub.load_state_dict(checkpoint['message_hub'])
    for hook, state in zip(_early_stopping(runner), run.get('early_stopping', []), strict=False):
        hook.best_score, hook.wait_count = state
    runner.validated = run.get('validated', -1)
    if optimizer:
        _resume_optimizer(runner, checkpoint, path, schedulers)
        _restore_gradients(runner, run)
    elif schedulers:
        for scheduler, state in zip(_schedulers(runner), _flat(checkpoint.get('param_schedulers')), strict=False):
            scheduler.load_state_dict(state)
    for part in _inexact(runner):
        runner.logger.warning(f'--resume: the run does not go on bit for bit, because {part}')
    if done == end:
        runner.logger.warning(f'--resume: the run has ended after {done} {name}: raise max_{name} to train on')


def _place_data(runner: Runner, run: Mapping[str, Any]) -> None:
    """Let the data of the first epoch go on behind what has been used; name what moves them."""
    loop = runner.train_loop
    for name, here in (('batch_size', _batch_size(loop.dataloader)), ('processes', get_world_size())):
        if run.get(name, here) != here:
            runner.logger.warning(
                f'--resume: {name} was {run[name]} and is {here} now: the order of the data changes, and the learning '
                'rate of the config is taken as it is'
            )
    if not isinstance(loop, EpochBasedTrainLoop) or not isinstance(loop.dataloader, ResumableLoader):
        return
    length, before = len(loop.dataloader), run.get('epoch_length') or len(loop.dataloader)
    used = loop.iter - loop.epoch * before
    if length != before:
        if used:
            runner.logger.warning(f'--resume: epoch {loop.epoch + 1} begins anew, as it has {length} batches now')
        loop._iter, used = loop.epoch * length, 0
    loop.dataloader.numbered.to_skip = used if 0 <= used <= length else 0
    loop.dataloader.numbered.pass_number = loop.epoch


def _resume_optimizer(runner: Runner, checkpoint: Mapping[str, Any], path: str, schedulers: bool) -> None:
    wrapper, run = runner.optim_wrapper, checkpoint.get(KEY) or {}
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
            f"checkpoint '{path}' cannot be resumed: the state of its optimiser does not fit ({error}): {REMEDY}"
        ) from None
    states = checkpoint.get('param_schedulers')
    if not fresh:  # several optimisers
        for scheduler, state in zip(_schedulers(runner), _flat(states), strict=False):
            scheduler.load_state_dict(state)
        return
    changes = _changes(fresh, wrapper.param_groups)
    if schedulers:
        changes += _schedule_changes(runner, _flat(states), run)
    loop = runner.train_loop
    moved = run.get('epoch_length') not in (None, len(loop.dataloader)) and run.get('max_epochs')
    for name in ('max_iters', 'max_epochs', 'accumulative_counts'):
        now = facts(runner)[name]
        if name in run and run[name] != now:
            changes.append(f'{name} was {run[name]} and is {now}')
    if not changes and not moved:
        for scheduler, state in zip(_schedulers(runner), _flat(states), strict=False):
            scheduler.load_state_dict(state)
        return
    runner.logger.warning(
        f'--resume: the config differs from that of the checkpoint ({"; ".join(changes[:6]) or "length of an epoch"}): '
        f'the config wins; learning rates are those that it gives at iteration {loop.iter} of its own schedule'
    )
    for group, settings in zip(wrapper.param_groups, fresh, strict=True):
        group.update({name: value for name, value in settings.items() if name != 'params'})
    replay(_schedulers(runner), _flat(states), loop.iter, loop.epoch, getattr(loop, 'dataloader', ()))


def _flat(states: Any) -> list:
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
    schedulers = _schedulers(runner)
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


def replay(schedulers: Iterable, states: list, iteration: int, epoch: int, loader: Any) -> None:
    """Step schedulers that are at their beginning to an iteration, in the order in which a run steps them.

    Args:
        schedulers: those of the config; one that follows a metric takes its state from the checkpoint.
        states: states of the checkpoint's schedulers.
        iteration: iterations that are over.
        epoch: epochs that are over.
        loader: the training data, for the length of an epoch.
    """
    steady = [scheduler for scheduler in schedulers if not getattr(scheduler, 'need_val_args', False)]
    for scheduler, state in zip(schedulers, states, strict=False):
        if scheduler not in steady and 'num_bad_epochs' in state:
            scheduler.load_state_dict({name: state[name] for name in state.keys() & POSITION})
    by_iteration = [scheduler for scheduler in steady if not scheduler.by_epoch]
    by_epoch = [scheduler for scheduler in steady if scheduler.by_epoch]
    length = len(loader) if epoch else math.inf
    with warnings.catch_warnings():
        warnings.simplefilter('ignore')  # a step of the scheduler without one of the optimiser
        for now in range(1, iteration + 1):
            for scheduler in by_iteration:
                scheduler.step()
            if now % length == 0 and now // length <= epoch:
                for scheduler in by_epoch:
                    scheduler.step()


def _restore_gradients(runner: Runner, run: Mapping[str, Any]) -> None:
    gradients = run.get('gradients')
    if gradients:
        parameters = dict(unwrapped(runner.model).named_parameters())
        for name, gradient in gradients.items():
            parameters[name].grad = gradient.to(parameters[name])


def _inexact(runner: Runner) -> list[str]:
    """Why the rest of a run cannot be what it would have been."""
    loop, reasons = runner.train_loop, []
    loader = loop.dataloader
    if not isinstance(loader, ResumableLoader):
        reasons.append(f'train_dataloader is a {type(loader).__name__} over {type(loader.dataset).__name__}')
    wrapper = runner.optim_wrapper
    if get_world_size() > 1 and _accumulating(wrapper, loop.iter):
        reasons.append('gradients were accumulated in several processes: save at a multiple of accumulative_counts')
    text = str(runner.cfg.get('train_dataloader')) + str(runner.cfg.get('model'))
    reasons += [f'{part} keeps what no checkpoint holds' for part in FORGETFUL if part in text]
    return reasons
