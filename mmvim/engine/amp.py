"""Mixed precision for backbone and neck, with heads in float32."""

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import cast

import torch
from mmengine.model import is_model_wrapper
from mmengine.optim import AmpOptimWrapper as _AmpOptimWrapper
from mmengine.optim import OptimWrapper
from torch import nn
from torch.utils._pytree import tree_map

from mmvim.arguments import check_choice, check_positive
from mmvim.registry import OPTIM_WRAPPERS

DTYPES = dict(bfloat16=torch.bfloat16, float16=torch.float16)


@OPTIM_WRAPPERS.register_module()
class AmpOptimWrapper(_AmpOptimWrapper):
    """Run backbone and neck under autocast and everything behind them in float32, on a GPU or a CPU.

    mmengine's wrapper puts the whole model under autocast and refuses a CPU. Boxes suffer from the former: in bfloat16
    a proposal of a 1024-pixel image lies on a grid of 4 pixels.

    Args:
        dtype: 'bfloat16', or 'float16' with loss scaling.
        loss_scale: 'dynamic', or a fixed number above 0, which is for float16 only.
        parts: attributes of the model to run under autocast; those that it lacks are skipped.
        kwargs: arguments of mmengine's OptimWrapper.

    Raises:
        ValueError: if dtype or loss_scale is illegal, loss_scale is given for bfloat16, parts are not names, or the
            model has none of them.
    """

    def __init__(
        self,
        dtype: str = 'bfloat16',
        loss_scale: str | float = 'dynamic',
        parts: Sequence[str] = ('backbone', 'neck'),
        **kwargs,
    ) -> None:
        check_choice('dtype', dtype, DTYPES)
        if loss_scale != 'dynamic':
            check_positive(loss_scale=loss_scale)
            if dtype != 'float16':
                raise ValueError(f"loss_scale={loss_scale} is for dtype='float16': {dtype} needs none, leave it out")
        if isinstance(parts, str) or not parts or not all(isinstance(part, str) for part in parts):
            raise ValueError(f'parts must be names of parts of the model, got {parts!r}')
        OptimWrapper.__init__(self, **kwargs)  # not _AmpOptimWrapper's, which refuses a CPU
        self.cast_dtype = DTYPES[dtype]
        self.parts = tuple(parts)
        scaled = self.cast_dtype is torch.float16
        fixed = {} if loss_scale == 'dynamic' else dict(init_scale=float(loss_scale))
        self._scale_update_param = fixed.get('init_scale') if scaled else None
        device = self.optimizer.param_groups[0]['params'][0].device.type
        self.loss_scaler = torch.amp.GradScaler(device, enabled=scaled, **fixed)

    @contextmanager
    def optim_context(self, model: nn.Module) -> Iterator[None]:
        """Context of one forward pass in training."""
        with OptimWrapper.optim_context(self, model), low_precision(model, self.parts, self.cast_dtype):
            yield


@contextmanager
def low_precision(model: nn.Module, parts: Sequence[str], dtype: torch.dtype) -> Iterator[None]:
    """Within it, the named parts of a model run under autocast, and the last of them returns float32.

    Args:
        model: a model, wrapped for distributed training or not.
        parts: attributes of the model, in the order in which data passes them.
        dtype: dtype of autocast.

    Raises:
        ValueError: if the model has none of the parts.
    """
    if is_model_wrapper(model):
        model = cast(nn.Module, model.module)
    modules = [getattr(model, part) for part in parts if isinstance(getattr(model, part, None), nn.Module)]
    if not modules:
        raise ValueError(f'{type(model).__name__} has none of {tuple(parts)}: name the parts to run in {dtype}')
    device = next(model.parameters()).device.type
    own = [module.__dict__.get('forward') for module in modules]  # such as that of activation checkpointing
    try:
        for module in modules:
            module.forward = _autocast(module.forward, device, dtype, back=module is modules[-1])
        yield
    finally:
        for module, forward in zip(modules, own, strict=True):
            module.__dict__.pop('forward', None)
            if forward is not None:
                module.forward = forward


def _autocast(forward, device: str, dtype: torch.dtype, back: bool):
    def run(*args, **kwargs):
        with torch.autocast(device, dtype=dtype):
            outputs = forward(*args, **kwargs)
        return tree_map(_to_float32, outputs) if back else outputs

    return run


def _to_float32(value):
    return value.float() if isinstance(value, torch.Tensor) and value.is_floating_point() else value
