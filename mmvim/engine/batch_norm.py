"""A warning of BatchNorm whose statistics differ from process to process."""

from mmengine.device import get_device
from mmengine.dist import get_world_size
from mmengine.hooks import Hook
from mmengine.runner import Runner
from torch import nn
from torch.nn.modules.batchnorm import _BatchNorm

from mmvim.engine.hooks import unwrapped
from mmvim.registry import HOOKS


@HOOKS.register_module()
class BatchNormHook(Hook):
    """Warn once if BatchNorm trains in several processes on a CPU, where no SyncBN exists.

    Each process then normalises by its own part of the batch, and the checkpoint has the running statistics of the
    first one. Layers that do not train, by `norm_eval` or as part of frozen stages, are left out.
    """

    def before_train(self, runner: Runner) -> None:
        """Look for layers with statistics of their own."""
        processes = get_world_size()
        if processes == 1 or get_device() != 'cpu':
            return
        model = unwrapped(runner.model).train()  # as the loop is about to do; frozen parts stay in evaluation
        names = per_process(model)
        if names:
            runner.logger.warning(
                f'{len(names)} layers of BatchNorm ({", ".join(names[:3])}{", ..." if len(names) > 3 else ""}) take '
                f'their statistics in each of {processes} processes alone, as a CPU has no SyncBN: use one process, '
                "norm_cfg=dict(type='GN', num_groups=32), or norm_eval=True"
            )


def per_process(model: nn.Module) -> list[str]:
    """Names of a model's layers of BatchNorm that use the statistics of the batch of their process."""
    return [
        name
        for name, layer in model.named_modules()
        if isinstance(layer, _BatchNorm) and not isinstance(layer, nn.SyncBatchNorm) and layer.training
    ]
