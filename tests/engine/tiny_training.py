"""A training of a tenth of a second with the real Runner: a linear classifier on four images."""

from itertools import count

import torch
from mmengine.config import Config
from mmengine.evaluator import BaseMetric, Evaluator
from mmengine.model import BaseModel
from torch import nn

from mmvim.engine.runner import Runner

CLIP = dict(clip_grad=dict(max_norm=1.0))
ITERATIONS = dict(type='IterBasedTrainLoop', max_iters=4)
EPOCHS = dict(type='EpochBasedTrainLoop', max_epochs=2)
_number = count()


class Metric(BaseMetric):
    def process(self, data_batch, data_samples):
        self.results.append(0)

    def compute_metrics(self, results):
        return dict(count=len(results))


class Classifier(BaseModel):
    """Breaks what it is asked to in the iteration that it is asked to: its loss, its gradients or its weights."""

    def __init__(self, breaks='', at=3, layers=nn.Identity):
        super().__init__()
        self.layers, self.head = layers(), nn.Linear(8, 3)
        self.register_buffer('mask', torch.full((2,), -torch.inf))
        self.breaks, self.at, self.steps = breaks, at, 0

    def forward(self, inputs, labels, img_path=None, mode='tensor'):
        if mode != 'loss':
            return [dict(score=0) for _ in inputs]
        self.steps += 1
        scores = self.head(self.layers(torch.stack(inputs)))
        loss = nn.functional.cross_entropy(scores, torch.stack(labels))
        broken = self.steps == self.at or (self.breaks == 'always' and self.steps > self.at)
        if broken and self.breaks in ('loss', 'always'):
            loss = loss * torch.nan
        if broken and self.breaks == 'gradients':  # the derivative of a root at 0 is infinite, times 0
            loss = loss + (self.head.weight.sum() * 0).sqrt()
        if broken and self.breaks == 'weights':
            self.head.bias.data[1] = torch.inf
            loss = loss.detach() * 0 + self.head.weight.sum() * 0
        return dict(loss_cls=loss, accuracy=torch.tensor(torch.nan))


def images(count=4):
    random = torch.Generator().manual_seed(0)
    return [
        dict(inputs=torch.randn(8, generator=random), labels=torch.tensor(i % 3), img_path=f'photos/{i}.jpg')
        for i in range(count)
    ]


def loader(sampler='DefaultSampler', dataset=None, **settings):
    settings = dict(dict(batch_size=2, collate_fn=dict(type='pseudo_collate')), **settings)
    shuffle = dict(sampler=dict(type=sampler, shuffle=False)) if isinstance(sampler, str) else dict(sampler=sampler)
    return dict(dataset=images() if dataset is None else dataset, **shuffle, **settings)


def build(work_dir, model=None, train_cfg=ITERATIONS, wrapper=CLIP, checkpoint=(), sampler='DefaultSampler', **more):
    by_epoch = 'max_epochs' in train_cfg
    hook = {**dict(type='CheckpointHook', interval=1, by_epoch=by_epoch), **dict(checkpoint)}
    config = Config(
        dict(
            work_dir=str(work_dir),
            train_cfg=train_cfg,
            optim_wrapper=dict(dict(optimizer=dict(type='SGD', lr=0.1)), **wrapper),
            default_hooks=dict(checkpoint=hook),
            experiment_name=f'finite-{next(_number)}',
        )
    )
    torch.manual_seed(0)
    more.setdefault('train_dataloader', loader(sampler))
    return Runner(model=model or Classifier(), cfg=config, **{**config, **more})


def validation(sampler='DefaultSampler', name='val'):
    return {
        f'{name}_dataloader': loader(sampler),
        f'{name}_cfg': dict(type=f'{name.title()}Loop'),
        f'{name}_evaluator': Evaluator([Metric()]),
    }
