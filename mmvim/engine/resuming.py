"""Go on with a run that was interrupted as if it had not been."""

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from mmengine.dist import broadcast_object_list, get_rank, get_world_size
from mmengine.hooks import Hook
from mmengine.optim import OptimWrapper
from mmengine.runner import EpochBasedTrainLoop, Runner
from mmengine.runner.checkpoint import _load_checkpoint

from mmvim.engine.hooks import unwrapped
from mmvim.engine.randomness import ResumableLoader
from mmvim.engine.resume_choice import REMEDY, Found, check_resumable, newest_checkpoint
from mmvim.engine.resume_optimizer import (
    batch_size_of,
    early_stopping_hooks,
    facts,
    flat,
    resume_optimizer,
    schedulers_of,
)
from mmvim.errors import CheckpointError, ConfigError
from mmvim.registry import HOOKS
from mmvim.weights import Conversion, compare
from mmvim.weights.reading import check_intact, find_state_dict

KEY = 'mmvim_run'  # entry of a checkpoint
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
        checkpoint[KEY]['validated'] = -1 if early_stopping_hooks(runner) else self.validated
        wrapper = runner.optim_wrapper
        if _accumulating(wrapper, getattr(wrapper, '_inner_count', 0)) and get_world_size() == 1:
            named = unwrapped(runner.model).named_parameters()
            checkpoint[KEY]['gradients'] = {name: p.grad.cpu() for name, p in named if p.grad is not None}

    def before_train(self, runner: Runner) -> None:
        """Validate, where the unbroken run would have done so after the checkpoint was saved."""
        loop, pending = runner.train_loop, getattr(runner, 'validated', None)
        if pending is None or runner.val_loop is None or pending == loop.iter or loop.iter == 0:
            return
        if not hasattr(loop, '_decide_current_val_interval'):  # a loop of the user's own
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


def _accumulating(wrapper: Any, count: int) -> bool:
    """Whether gradients of earlier iterations wait for the next step of the optimiser."""
    return (
        isinstance(wrapper, OptimWrapper) and count % wrapper._accumulative_counts != 0 and count != wrapper._max_counts
    )


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
            found = Found.read(given)
            check_intact(given)
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
    run = checkpoint[KEY] if isinstance(checkpoint.get(KEY), Mapping) else {}
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
    for hook, state in zip(early_stopping_hooks(runner), run.get('early_stopping', []), strict=False):
        hook.best_score, hook.wait_count = state
    runner.validated = run.get('validated', -1)
    if optimizer:
        resume_optimizer(runner, checkpoint, run, path, schedulers)
        _restore_gradients(runner, run)
    elif schedulers:
        for scheduler, state in zip(schedulers_of(runner), flat(checkpoint.get('param_schedulers')), strict=False):
            scheduler.load_state_dict(state)
    for part in _inexact(runner):
        runner.logger.warning(f'--resume: the run does not go on bit for bit, because {part}')
    if done == end:
        runner.logger.warning(f'--resume: the run has ended after {done} {name}: raise max_{name} to train on')


def _place_data(runner: Runner, run: Mapping[str, Any]) -> None:
    """Let the data of the first epoch go on behind what has been used; name what moves them."""
    loop = runner.train_loop
    for name, here in (('batch_size', batch_size_of(loop.dataloader)), ('processes', get_world_size())):
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
