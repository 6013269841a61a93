"""The end of a run whose losses, gradients or weights are no longer finite."""

import math
from collections.abc import Iterable, Iterator
from contextlib import suppress
from functools import partialmethod

import torch
from mmengine.dist import all_gather_object, all_reduce, barrier, get_world_size
from mmengine.hooks import CheckpointHook, Hook
from mmengine.optim import OptimWrapper
from mmengine.runner import Runner
from torch import Tensor, nn

from mmvim.arguments import check_numbers
from mmvim.engine.hooks import unwrapped
from mmvim.errors import ConfigError, RunError
from mmvim.registry import HOOKS

UNSCALED, SCALED = 0, 20  # allowed in a row; 20 halvings take float16's first loss scale from 65,536 to below 0.1
REMEDY = (
    'lower optim_wrapper.optimizer.lr, set optim_wrapper.clip_grad.max_norm=1.0, or check the images and their '
    'annotations, then continue from the last checkpoint with --resume'
)


@HOOKS.register_module()
class FiniteHook(Hook):
    """Stop training when a loss, a gradient or a weight is not finite, before a checkpoint is written.

    Losses are looked at in every iteration, and so is the norm of the gradients if it is clipped; mmengine has read
    both from the device by then, to log them. Weights are looked at before a checkpoint and before a validation, one
    wait for the device each. In several processes all of them stop.

    Args:
        allowed: iterations in a row that may be without a finite loss or gradient. None means 20 with loss scaling,
            which skips such a step and lowers its scale, and otherwise 0.

    Raises:
        ConfigError: if iterations are allowed but nothing skips their step, which would destroy the weights.
        RunError: naming the iteration, the losses and the images of the batch.
    """

    priority = 'BELOW_NORMAL'  # after the losses are logged and a moving average is updated, before a checkpoint

    def __init__(self, allowed: int | None = None) -> None:
        if allowed is not None:
            check_numbers(0, allowed=allowed)
        self.allowed = allowed

    def before_train(self, runner: Runner) -> None:
        """Refuse weights that are not finite from the start, other than buffers such as masks of -inf."""
        self.scales = _scales(runner)
        skips = len(self.scales) == len(_wrappers(runner))
        if self.allowed and not skips:
            raise ConfigError(
                f'FiniteHook.allowed={self.allowed} is for loss scaling, which skips the step of a loss that is not '
                "finite: use optim_wrapper.type='mmvim.AmpOptimWrapper' with dtype='float16', or leave it out"
            )
        self.limit = (SCALED if skips else UNSCALED) if self.allowed is None else self.allowed
        self.row, self.iteration = 0, runner.iter
        self.before: list[str] = []
        model = unwrapped(runner.model)
        self.ignored = set(_not_finite(model.named_buffers()))
        wrong = _not_finite(model.named_parameters())
        if wrong:
            source = f"checkpoint '{runner._load_from}'" if runner._load_from else 'its initialisation or init_cfg'
            raise RunError(
                f'the model has weights that are not finite before training ({_some(wrong)}): check {source}'
            )

    def after_train_iter(
        self, runner: Runner, batch_idx: int, data_batch: object = None, outputs: dict | None = None
    ) -> None:
        """Look at the losses and gradients of an iteration, and at the weights if a checkpoint comes next."""
        self.iteration = runner.iter + 1
        losses = [f'{name} is {value}' for name, value in _losses(outputs) if not math.isfinite(value)]
        wrong = losses or self._wrong_gradients(runner)
        self.row = self.row + 1 if wrong else 0
        text = None
        if self.row > self.limit:
            text = (
                f'{", ".join(wrong)} in iteration {self.iteration} ({self._images(runner, data_batch)})'
                f'{f", as in the {self.limit} before" if self.limit else ""}: {REMEDY}'
            )
        elif self._saves_iteration(runner):
            text = self._wrong_weights(runner.model)
        stop_together(text, 2 if losses else 1)
        self.before = list(image_names(data_batch))

    def _images(self, runner: Runner, data_batch: object) -> str:
        """Images that may be the cause: without clipping the step before may have been one without finite gradients."""
        names = list(image_names(data_batch))
        text = f'images {_some(names)}' if names else 'a batch without file names'
        watched = all(wrapper.clip_grad_kwargs for wrapper in _wrappers(runner))
        return text if watched or not self.before else f'{text}; one iteration before {_some(self.before)}'

    def after_train_epoch(self, runner: Runner) -> None:
        """Look at the weights before the checkpoint of an epoch."""
        self._check_weights(runner)

    def _check_weights(self, runner: Runner) -> None:
        if hasattr(self, 'ignored'):  # not in a validation without training
            stop_together(self._wrong_weights(runner.model))

    before_val_epoch = partialmethod(_check_weights)

    def before_save_checkpoint(self, runner: Runner, checkpoint: dict) -> None:
        """Look at what is about to be written, whoever asked for it: averaged weights and the optimiser's state too."""
        if not hasattr(self, 'ignored'):  # no training
            return
        ignored = {prefix + name for name in self.ignored for prefix in ('', 'module.')}
        parts = ('state_dict', 'ema_state_dict', 'optimizer')
        found = [(key, name) for key in parts for name in _not_finite(_tensors(checkpoint.get(key)))]
        wrong = [f'{key}: {name}' for key, name in found if name not in ignored]
        if wrong:
            raise RunError(self._explain(wrong))

    def _wrong_weights(self, model: nn.Module) -> str | None:
        states = unwrapped(model).state_dict().items()
        wrong = [name for name in _not_finite(states) if name not in self.ignored]
        return self._explain(wrong) if wrong else None

    def _explain(self, names: list[str]) -> str:
        return (
            f'weights are not finite after iteration {self.iteration} ({_some(names)}), though the losses were; no '
            f'checkpoint is written: {REMEDY}'
        )

    def _wrong_gradients(self, runner: Runner) -> list[str]:
        """What says that gradients were not finite: their clipped norm, or a loss scale that went down."""
        found, scales = [], _scales(runner)
        if any(now < before for now, before in zip(scales, self.scales, strict=True)):
            found.append(f'the gradients are not finite with a loss scale of {min(self.scales):g}')
        self.scales = scales
        for wrapper in _wrappers(runner):
            norm = runner.message_hub.log_scalars.get(f'train/{getattr(wrapper, "grad_name", "grad_norm")}')
            if wrapper.clip_grad_kwargs and wrapper.should_update() and norm and not math.isfinite(norm.current()):
                found.append(f'the norm of the gradients is {norm.current()}')
        return found

    @staticmethod
    def _saves_iteration(runner: Runner) -> bool:
        return any(
            hook.every_n_train_iters(runner, hook.interval, hook.save_begin)
            or (hook.save_last and hook.is_last_train_iter(runner))
            for hook in runner.hooks
            if isinstance(hook, CheckpointHook) and not hook.by_epoch
        )


def stop_together(text: str | None, weight: int = 1) -> None:
    """Raise if any process has a reason to stop, in all of them, which would otherwise wait for one another.

    Args:
        text: the reason of this process; None if it has none.
        weight: how close the reason is to the cause: a loss of one process makes the gradients of all not finite.

    Raises:
        RunError: with the reason of this process if none weighs more, or of the first one that weighs most.
    """
    if get_world_size() > 1:
        weight = weight if text else 0
        most = torch.tensor(float(weight))
        all_reduce(most, 'max')
        if most:
            reasons = all_gather_object((weight, text))
            with suppress(RuntimeError):  # nobody leaves, which breaks the connection, before all know the reason
                barrier()
            rank = next(rank for rank, reason in enumerate(reasons) if reason[0] == most)
            text = text if weight == most else f'process {rank} stopped: {reasons[rank][1]}'
    if text is not None:
        raise RunError(text)


def image_names(batch: object) -> Iterator[str]:
    """Paths of the images in a data loader's batch, however nested."""
    path = getattr(batch, 'img_path', None) or (batch.get('img_path') if isinstance(batch, dict) else None)
    if path:
        yield from [path] if isinstance(path, str) else path
    elif isinstance(batch, dict):
        for value in batch.values():
            yield from image_names(value)
    elif isinstance(batch, list | tuple):
        for value in batch:
            yield from image_names(value)


def _losses(outputs: object) -> list[tuple[str, float]]:
    """The losses that a training step logged."""
    logged = outputs.items() if isinstance(outputs, dict) else ()
    return [
        (name, torch.as_tensor(value).detach().item())
        for name, value in logged
        if 'loss' in name and not isinstance(value, str)
    ]


def _wrappers(runner: Runner) -> list[OptimWrapper]:
    wrapper = runner.optim_wrapper
    return [wrapper] if isinstance(wrapper, OptimWrapper) else list(wrapper.values())


def _scales(runner: Runner) -> list[float]:
    """Loss scales of the wrappers that have one."""
    scalers = [getattr(wrapper, 'loss_scaler', None) for wrapper in _wrappers(runner)]
    return [scaler.get_scale() for scaler in scalers if scaler is not None and scaler.is_enabled()]


def _tensors(value: object, name: str = '') -> Iterator[tuple[str, Tensor]]:
    """The tensors in nested dicts and lists, by dotted name."""
    if isinstance(value, Tensor):
        yield name, value
    elif isinstance(value, dict | list | tuple):
        for key, child in value.items() if isinstance(value, dict) else enumerate(value):
            yield from _tensors(child, f'{name}.{key}' if name else str(key))


def _not_finite(tensors: Iterable[tuple[str, Tensor]]) -> list[str]:
    """Names of those that hold a value that is not finite, with one wait for the device."""
    named = {name: tensor for name, tensor in tensors if tensor.is_floating_point() and tensor.numel()}
    if not named:
        return []
    finite = torch.stack([tensor.detach().isfinite().all() for tensor in named.values()]).tolist()
    return [name for name, good in zip(named, finite, strict=True) if not good]


def _some(names: list[str], most: int = 8) -> str:
    return ', '.join(names[:most]) + (f' and {len(names) - most} more' if len(names) > most else '')
