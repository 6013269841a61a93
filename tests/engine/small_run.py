"""A training run of a second that draws random numbers wherever one can, for tests of resuming and `kill_runs.py`."""

import random

import numpy as np
import torch
from mmengine.config import Config
from mmengine.dataset import BaseDataset
from mmengine.evaluator import BaseMetric
from mmengine.model import BaseModel
from mmengine.registry import DATASETS, METRICS, MODELS
from torch import nn

from mmvim.engine.runner import Runner
from mmvim.models import VisionMamba

SAMPLES = 10


@DATASETS.register_module()
class SmallImages(BaseDataset):
    """Images of noise, upright and wide in turn, drawn anew by all three random generators."""

    METAINFO = dict(classes=('a', 'b', 'c'))

    def load_data_list(self):
        sizes = [dict(width=48, height=32), dict(width=32, height=48)]
        return [dict(label=i % 3, sample=i, **sizes[i % 2]) for i in range(SAMPLES)]

    def get_cat_ids(self, index):
        return [index % 3]

    def prepare_data(self, index):
        info = self.get_data_info(index)
        image = torch.randn(3, 32, 48, generator=torch.Generator().manual_seed(info['sample']))
        if not self.test_mode:
            image = image * random.uniform(0.5, 1.5) + float(np.random.normal()) + 0.1 * torch.randn(3, 1, 1)
            if random.random() < 0.5:
                image = image.flip(-1)
        return dict(inputs=image, labels=torch.tensor(info['label']))


@MODELS.register_module()
class SmallClassifier(BaseModel):
    def __init__(self):
        super().__init__()
        arch = dict(embed_dims=16, depth=2, d_state=2)
        self.backbone = VisionMamba(arch=arch, img_size=(32, 48), cls_token='head', drop_path_rate=0.3)
        self.norm = nn.BatchNorm1d(16)
        self.head = nn.Sequential(nn.Dropout(0.3), nn.Linear(16, 3))

    def forward(self, inputs, labels, mode='tensor'):
        images, labels = torch.stack(inputs), torch.stack(labels)
        if mode == 'predict':
            scores = self.head(self.norm(self.backbone(images)[-1]))
            return list(scores)
        share, order = np.random.beta(0.8, 0.8), torch.randperm(len(images))  # mixup
        scores = self.head(self.norm(self.backbone(share * images + (1 - share) * images[order])[-1]))
        loss = share * nn.functional.cross_entropy(scores, labels)
        return dict(loss=loss + (1 - share) * nn.functional.cross_entropy(scores, labels[order]))


@METRICS.register_module()
class SmallMetric(BaseMetric):
    """The mean score; draws random numbers on the way."""

    def process(self, data_batch, data_samples):
        random.random(), np.random.random(), torch.rand(1)
        self.results += [scores.mean().item() for scores in data_samples]

    def compute_metrics(self, results):
        return dict(acc=float(np.mean(results)))


def loader(workers=0, test_mode=False, **settings):
    return dict(
        dataset=dict(type='SmallImages', test_mode=test_mode),
        batch_size=2,
        num_workers=workers,
        persistent_workers=workers > 0,
        collate_fn=dict(type='pseudo_collate'),
        **settings,
    )


def config(work_dir, by_epoch=False, end=8, interval=None, workers=0, accumulate=1, sampler=None, seed=None, **more):
    """Settings of a run.

    Args:
        end: iterations or epochs, of 5 batches each.
        interval: of checkpoints; in iterations if a number, such as `(1, True)` in epochs.
        more: what the config has beside, or has in place of the defaults.
    """
    every, hook_by_epoch = interval if isinstance(interval, tuple) else (interval or 2, False)
    wanted = dict(
        work_dir=str(work_dir),
        model=dict(type='SmallClassifier'),
        train_dataloader=loader(workers, **(sampler or dict(sampler=dict(type='DefaultSampler', shuffle=True)))),
        train_cfg=dict(
            by_epoch=by_epoch, **{'max_epochs' if by_epoch else 'max_iters': end}, val_interval=2 - by_epoch
        ),
        val_dataloader=loader(0, True, sampler=dict(type='DefaultSampler', shuffle=False)),
        val_cfg={},
        val_evaluator=dict(type='SmallMetric'),
        optim_wrapper=dict(
            type='OptimWrapper', optimizer=dict(type='AdamW', lr=0.01, weight_decay=0.1), accumulative_counts=accumulate
        ),
        param_scheduler=[
            dict(type='LinearLR', begin=0, end=3, by_epoch=False, start_factor=0.1),
            dict(type='CosineAnnealingLR', T_max=end, by_epoch=by_epoch),
        ],
        default_hooks=dict(
            logger=dict(type='LoggerHook', interval=1000),
            checkpoint=dict(type='CheckpointHook', interval=every, by_epoch=hook_by_epoch),
        ),
        custom_hooks=[dict(type='EMAHook', momentum=0.1)],
        randomness=dict(seed=seed),
        experiment_name=f'{work_dir.parent.name}-{work_dir.name}-{random.getrandbits(64)}',
        log_level='ERROR',
        default_scope='mmengine',
    )
    return Config({**wanted, **more})


def train(work_dir, **settings):
    """Carry out a run and return its runner."""
    runner = Runner.from_cfg(config(work_dir, **settings))
    runner.train()
    return runner


def differences(one, other):
    """What differs in two checkpoint files, among all that a run goes on with."""
    one, other = (torch.load(file, weights_only=False) for file in (one, other))
    keys = ('state_dict', 'ema_state_dict', 'optimizer', 'param_schedulers')
    return [f'{key}{path}' for key in keys for path in _differences(one.get(key), other.get(key))]


def _differences(one, other, path=''):
    if type(one) is not type(other):
        yield f'{path}: {type(one)} {type(other)}'
    elif isinstance(one, dict):
        if one.keys() != other.keys():
            yield f'{path}: other keys'
        for key in one.keys() & other.keys():
            yield from _differences(one[key], other[key], f'{path}.{key}')
    elif isinstance(one, list | tuple):
        if len(one) != len(other):
            yield f'{path}: other length'
        for index, (a, b) in enumerate(zip(one, other, strict=False)):
            yield from _differences(a, b, f'{path}.{index}')
    elif not (torch.equal(one, other) if isinstance(one, torch.Tensor) else one == other):
        yield path
