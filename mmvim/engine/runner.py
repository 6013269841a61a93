"""mmengine's Runner with checked input, for all three hosts and for machines without a GPU."""

import copy

import torch
from mmengine.device import get_device
from mmengine.dist import is_distributed
from mmengine.hooks import LoggerHook
from mmengine.model import MMDistributedDataParallel, revert_sync_batchnorm
from mmengine.runner import Runner as _Runner
from torch import nn

from mmvim.config.completion import complete_config
from mmvim.config.data import NUMPY_MESSAGE, check_data_root, dataset_of, explain_empty
from mmvim.config.files import config_files, follow_validation
from mmvim.config.loops import check_length
from mmvim.config.unread import check_read, runner_keys
from mmvim.errors import ConfigError, DataError
from mmvim.registry import RUNNERS

CHECKS = ('ClassCountHook', 'LabelMapHook', 'CheckpointFitHook', 'FiniteHook', 'LoopHook', 'BatchNormHook')


@RUNNERS.register_module()
class Runner(_Runner):
    """mmengine's Runner with checked input.

    In addition to what mmengine's does, it

    - fills in what follows from the data (:func:`mmvim.config.completion.complete_config`),
    - refuses a config file with a key that nothing reads (:mod:`mmvim.config.unread`),
    - refuses heads and label maps that do not fit the classes, and checkpoints that do not fit the model,
    - stops when a loss, gradient or weight is not finite, and refuses a run that would not end or save nothing,
    - trains in one or several processes on a CPU, with SyncBN turned into BatchNorm there,
    - logs the progress of a test at least ten times.

    A config asks for it by ``runner_type='mmvim.Runner'``, which the train and test tools of every host obey.
    """

    testing = False

    @classmethod
    def from_cfg(cls, cfg) -> 'Runner':
        """Build a runner from a config.

        Raises:
            ConfigError: if a file of the config sets a key that nothing reads.
        """
        cfg = copy.deepcopy(cfg)
        files = config_files(getattr(cfg, 'filename', None))
        follow_validation(cfg, files)
        check_read(cfg, files, complete_config(cfg) | runner_keys(cfg))
        check_length(cfg.get('train_cfg'))
        return super().from_cfg(cfg)

    def setup_env(self, env_cfg: dict) -> None:
        """Set up processes; on a CPU they talk by gloo."""
        if self.distributed and not is_distributed() and get_device() == 'cpu':
            if self.launcher != 'pytorch':
                raise ConfigError(f"launcher '{self.launcher}' needs GPUs: on a CPU use --launcher pytorch (torchrun)")
            torch.distributed.init_process_group('gloo')
        super().setup_env(env_cfg)

    def wrap_model(self, model_wrapper_cfg: dict | None, model: nn.Module) -> nn.Module:
        """Wrap the model for distributed training."""
        if not self.distributed or get_device() != 'cpu':
            return super().wrap_model(model_wrapper_cfg, model)
        settings = dict(broadcast_buffers=False, find_unused_parameters=self.cfg.get('find_unused_parameters', False))
        settings.update({k: v for k, v in (model_wrapper_cfg or {}).items() if k != 'type'})
        return MMDistributedDataParallel(module=revert_sync_batchnorm(model), **settings)

    def register_hooks(self, default_hooks: dict | None = None, custom_hooks: list | None = None) -> None:
        """Register the config's hooks and the checks."""
        super().register_hooks(default_hooks, custom_hooks)
        there = {type(hook).__name__ for hook in self.hooks}  # set by the config
        for check in (check for check in CHECKS if check not in there):
            self.register_hook(dict(type=f'mmvim.{check}'))

    @staticmethod
    def build_dataloader(dataloader, *args, **kwargs):
        """Build a data loader.

        Raises:
            DataError: if the folder of its data set does not exist, or the data set is empty.
        """
        dataset = dataloader.get('dataset') if isinstance(dataloader, dict) else None
        if not isinstance(dataset, dict):  # built already
            return _Runner.build_dataloader(dataloader, *args, **kwargs)
        check_data_root(dataset_of(dataloader))
        try:
            return _Runner.build_dataloader(dataloader, *args, **kwargs)
        except ValueError as error:
            if NUMPY_MESSAGE in str(error):
                raise DataError(explain_empty(dataset)) from None
            raise

    def test(self) -> dict:
        """Test; returns the metrics by name."""
        self.testing = True
        return super().test()

    def build_test_loop(self, loop):
        """Build the loop of a test."""
        loop = super().build_test_loop(loop)
        for hook in self.hooks:
            if isinstance(hook, LoggerHook):
                hook.interval = max(1, min(hook.interval, len(loop.dataloader) // 10))
        return loop
