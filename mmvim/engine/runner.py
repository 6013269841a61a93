"""mmengine's Runner with checked input, for all three hosts and for machines without a GPU."""

import copy
from collections.abc import Callable

import torch
from mmengine.device import get_device
from mmengine.dist import is_distributed
from mmengine.hooks import LoggerHook
from mmengine.model import MMDistributedDataParallel, revert_sync_batchnorm
from mmengine.runner import EpochBasedTrainLoop
from mmengine.runner import Runner as _Runner
from torch import nn
from torch.utils.data import DataLoader

from mmvim.config.completion import complete_config
from mmvim.config.data import NUMPY_MESSAGE, check_data_root, check_one_metainfo, explain_empty, parts
from mmvim.config.files import config_files, follow_validation
from mmvim.config.loops import check_length
from mmvim.config.unread import check_read, runner_keys
from mmvim.datasets.pipelines import name_samples
from mmvim.engine.randomness import make_resumable
from mmvim.engine.resuming import resume_run, settle
from mmvim.errors import ConfigError, DataError
from mmvim.registry import RUNNERS

OWN_HOOKS = (
    'ClassCountHook', 'ClassLabelHook', 'LabelMapHook', 'CheckpointFitHook', 'FiniteHook', 'LoopHook', 'BatchNormHook',
    'RandomStateHook', 'ResumeHook', 'DigestHook',
)  # fmt: skip
MMENGINES = ('EpochBasedTrainLoop', 'mmengine.EpochBasedTrainLoop', EpochBasedTrainLoop)


@RUNNERS.register_module()
class Runner(_Runner):
    """mmengine's Runner with checked input.

    In addition to what mmengine's does, it

    - fills in what follows from the data (:func:`mmvim.config.completion.complete_config`),
    - refuses a config file with a key that nothing reads (:mod:`mmvim.config.unread`),
    - refuses heads, labels and label maps that do not fit the classes, and checkpoints that do not fit the model,
    - looks through images and label maps of a segmentation data set before it uses them,
    - names the sample in an error of a data set's pipeline,
    - stops when a loss, gradient or weight is not finite, and refuses a run that would not end or save nothing,
    - notes a digest in every checkpoint,
    - resumes from the newest checkpoint of the work directory that can be read, as if it had not been interrupted,
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
        """Register the config's hooks and those of every run."""
        super().register_hooks(default_hooks, custom_hooks)
        there = {type(hook).__name__ for hook in self.hooks}  # set by the config
        for name in (name for name in OWN_HOOKS if name not in there):
            self.register_hook(dict(type=f'mmvim.{name}'))

    @staticmethod
    def build_dataloader(dataloader, *args, **kwargs):
        """Build a data loader.

        Raises:
            DataError: if the folder of its data set does not exist, the data set is empty, or joins sets whose classes
                differ.
        """
        dataset = dataloader.get('dataset') if isinstance(dataloader, dict) else None
        if not isinstance(dataset, dict):  # built already
            return _named(_Runner.build_dataloader(dataloader, *args, **kwargs))
        for part in parts(dataset):
            check_data_root(part)
        try:
            loader = _named(_Runner.build_dataloader(dataloader, *args, **kwargs))
        except ValueError as error:
            if NUMPY_MESSAGE in str(error):
                raise DataError(explain_empty(dataset)) from None
            raise
        check_one_metainfo(loader.dataset)
        return loader

    def build_train_loop(self, loop):
        """Build the loop of a training, whose random numbers depend on the seed and the position in the run alone."""
        if isinstance(loop, dict):
            rest = {key: value for key, value in loop.items() if key not in ('type', 'by_epoch')}
            if loop.get('type') in MMENGINES and 'by_epoch' not in loop or loop == {**rest, 'by_epoch': True}:
                loop = dict(rest, type='mmvim.EpochBasedTrainLoop')
        loop = super().build_train_loop(loop)
        make_resumable(loop, self.seed)
        return loop

    def train(self) -> nn.Module:
        """Train; returns the model.

        Raises:
            CheckpointError: if it is to resume, and the checkpoint, or each of the work directory, is of no use.
        """
        seed = settle(self)
        mine = self.seed - (self.rank if self._randomness_cfg.get('diff_rank_seed') else 0)
        if seed is not None and self._randomness_cfg.get('seed') not in (None, seed):
            self.logger.warning(f'--resume: the seed stays {seed}, as in the checkpoint; the config has {mine}')
        self._randomness_cfg.update(seed=mine if seed is None else seed)
        self.set_randomness(**self._randomness_cfg)  # what follows is the same in a resumed run
        return super().train()

    def resume(
        self,
        filename: str,
        resume_optimizer: bool = True,
        resume_param_scheduler: bool = True,
        map_location: str | Callable = 'default',
    ) -> None:
        """Go on with the run that saved a checkpoint.

        Raises:
            CheckpointError: if the checkpoint lacks a part, or does not fit.
            ConfigError: if a run of this config has ended before.
        """
        self._resume, self._load_from = True, filename
        device = get_device() if map_location == 'default' else map_location
        checkpoint = self.load_checkpoint(filename, map_location=device)
        self.optim_wrapper = self.build_optim_wrapper(self.optim_wrapper)
        if self.param_schedulers is not None:
            self.param_schedulers = self.build_param_scheduler(self.param_schedulers)
        resume_run(self, checkpoint, filename, resume_optimizer, resume_param_scheduler)
        self._has_loaded = True
        self.logger.info(f'resumed epoch: {self.epoch}, iter: {self.iter}')

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


def _named(loader: DataLoader) -> DataLoader:
    name_samples(loader.dataset)
    return loader
