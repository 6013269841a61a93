"""A run that would not end, or would save, validate or schedule nothing, is refused or warned of before it starts."""

import numpy as np
import pytest
import torch
from mmengine.config import Config
from mmengine.dataset import InfiniteSampler
from mmengine.hooks import ProfilerHook
from mmengine.registry import DATA_SAMPLERS
from tiny_training import EPOCHS, ITERATIONS, build, images, loader, validation
from torch.utils.data import BatchSampler, ConcatDataset

from mmvim.config.loops import check_length
from mmvim.engine.loops import is_endless
from mmvim.engine.runner import Runner
from mmvim.errors import ConfigError


@DATA_SAMPLERS.register_module()
class DerivedSampler(InfiniteSampler):
    pass


@DATA_SAMPLERS.register_module()
class WrappedSampler:
    def __init__(self, dataset, **kwargs):
        self.sampler = InfiniteSampler(dataset)

    def __iter__(self):
        return iter(self.sampler)

    def __len__(self):
        return len(self.sampler)


@DATA_SAMPLERS.register_module()
class EndlessBatches(BatchSampler):
    """Has no end though the sampler that it draws from has one."""

    def __iter__(self):
        while True:
            yield from super().__iter__()


@DATA_SAMPLERS.register_module()
class RandomStateSampler:
    """Ends, and draws from the global random states."""

    def __init__(self, dataset, **kwargs):
        self.length = len(dataset)

    def __iter__(self):
        np.random.rand(3), torch.rand(3)
        return iter(range(self.length))

    def __len__(self):
        return self.length


ENDLESS = {
    'InfiniteSampler': loader('InfiniteSampler'),
    'DerivedSampler': loader('DerivedSampler'),
    'WrappedSampler': loader('WrappedSampler'),
    'EndlessBatches': loader(batch_sampler=dict(type='EndlessBatches', drop_last=False)),
    'MultiSourceSampler': loader(
        dict(type='mmdet.MultiSourceSampler', batch_size=2, source_ratio=[1, 1]),
        dataset=ConcatDataset([images(), images()]),
    ),
}
ENDLESS['AspectRatio'] = loader('InfiniteSampler', batch_sampler=dict(type='mmdet.AspectRatioBatchSampler'))


@pytest.mark.parametrize('name', ENDLESS)
def test_an_epoch_without_end_is_refused(tmp_path, name):
    if 'mmdet' in str(ENDLESS[name]):
        pytest.importorskip('mmdet.datasets')
    shown = 'InfiniteSampler' if name in ('AspectRatio', 'WrappedSampler') else name
    with pytest.raises(ConfigError, match=f'^train_dataloader draws from {shown}.*DefaultSampler') as raised:
        build(tmp_path, train_cfg=EPOCHS, train_dataloader=ENDLESS[name]).train()
    assert "train_cfg.type='IterBasedTrainLoop' with max_iters" in str(raised.value)


@pytest.mark.parametrize('loop', [EPOCHS, ITERATIONS])
def test_a_validation_or_test_without_end_is_refused(tmp_path, loop):
    with pytest.raises(ConfigError, match='^val_dataloader draws from InfiniteSampler.*shuffle=False'):
        build(tmp_path, train_cfg=loop, **validation('InfiniteSampler')).train()
    for name in ('val', 'test'):
        with pytest.raises(ConfigError, match=f'^{name}_dataloader draws from InfiniteSampler.*shuffle=False'):
            getattr(build(tmp_path, **validation('InfiniteSampler', name)), name)()


def test_iterations_may_be_drawn_without_end(tmp_path):
    build(tmp_path, sampler='InfiniteSampler', **validation()).train()


def test_a_sampler_that_ends_is_asked_without_a_trace():
    torch.manual_seed(0), np.random.seed(0)
    expected = torch.rand(1), np.random.rand(1)
    torch.manual_seed(0), np.random.seed(0)
    assert not is_endless(BatchSampler(RandomStateSampler(images()), 2, drop_last=False))
    assert (torch.rand(1), np.random.rand(1)) == expected


SCHEDULE = dict(type='LinearLR', start_factor=0.1)


@pytest.mark.parametrize(
    ('settings', 'expected'),
    [
        (
            dict(param_scheduler=dict(SCHEDULE, by_epoch=True)),
            r'^param_scheduler.0 \(LinearLR\) counts epochs.*',
        ),
        (
            dict(param_scheduler=[dict(SCHEDULE, by_epoch=False), dict(type='MultiStepLR', milestones=[3])]),
            r'^param_scheduler.1 \(MultiStepLR\) counts epochs',
        ),
        (dict(checkpoint=dict(by_epoch=True)), '^default_hooks.checkpoint counts epochs.*by_epoch=False'),
        (dict(checkpoint=dict(interval=9, save_last=False)), 'saves every 9 iterations, but the run ends after 4'),
        (
            dict(checkpoint=dict(interval=1, save_begin=5, save_last=False)),
            'saves every 1 iterations, but the run ends after 4',
        ),
        (
            dict(train_cfg=EPOCHS, checkpoint=dict(interval=9, save_last=False)),
            'saves every 9 epochs, but the run ends after 2',
        ),
    ],
)
def test_what_would_not_happen_is_refused(tmp_path, settings, expected):
    with pytest.raises(ConfigError, match=expected):
        build(tmp_path, **settings).train()
    assert not list(tmp_path.glob('*.pth'))


@pytest.mark.parametrize(
    ('settings', 'expected'),
    [
        (
            dict(param_scheduler=dict(SCHEDULE, by_epoch=False, begin=4, end=9)),
            'begins after 4 iterations, ',
        ),
        (
            dict(train_cfg=EPOCHS, param_scheduler=dict(SCHEDULE, begin=2, end=9)),
            'begins after 2 epochs',
        ),
        (
            dict(train_cfg=dict(ITERATIONS, val_begin=5), **validation()),
            'train_cfg.val_begin=5, but',
        ),
        (
            dict(train_cfg=dict(EPOCHS, val_begin=3), **validation()),
            'train_cfg.val_begin=3, but',
        ),
        (
            dict(custom_hooks=[ProfilerHook(by_epoch=True, profile_times=1)], train_cfg=ITERATIONS),
            'ProfilerHook counts epochs',
        ),
    ],
)
def test_what_begins_too_late_is_warned_of(tmp_path, capfd, settings, expected):
    build(tmp_path, **settings).train()
    assert expected in ''.join(capfd.readouterr())


def test_schedules_and_checkpoints_may_count_iterations_in_epochs(tmp_path):
    schedule = dict(SCHEDULE, by_epoch=True, convert_to_iter_based=True, end=2)
    build(tmp_path, train_cfg=EPOCHS, checkpoint=dict(by_epoch=False, interval=3), param_scheduler=schedule).train()
    assert sorted(file.name for file in tmp_path.glob('*.pth')) == ['iter_3.pth', 'iter_4.pth']


@pytest.mark.parametrize(
    ('train_cfg', 'expected'),
    [
        (dict(type='IterBasedTrainLoop', max_epochs=2), r'^train_cfg.max_epochs=2 is not for IterBasedTrainLoop'),
        (dict(type='EpochBasedTrainLoop', max_iters=2), r'^train_cfg.max_iters=2 is not for EpochBasedTrainLoop'),
        (dict(by_epoch=True, max_iters=2), r'^train_cfg.max_iters=2 is not for EpochBasedTrainLoop'),
        (dict(by_epoch=False, max_epochs=2), r'^train_cfg.max_epochs=2 is not for IterBasedTrainLoop'),
        (dict(type='IterBasedTrainLoop', by_epoch=False, max_iters=2), "has both 'type' and 'by_epoch'"),
        (dict(type='IterBasedTrainLoop'), 'train_cfg.max_iters must be a whole number of at least 1, got None'),
        (dict(type='mmengine.EpochBasedTrainLoop', max_epochs=0), 'train_cfg.max_epochs must be .* got 0'),
        (dict(max_epochs=2.5), 'train_cfg.max_epochs must be .* got 2.5'),
    ],
)
def test_a_length_is_in_the_unit_of_its_loop(tmp_path, train_cfg, expected):
    with pytest.raises(ConfigError, match=expected):
        Runner.from_cfg(Config(dict(train_cfg=train_cfg, work_dir=str(tmp_path), model=dict())))


@pytest.mark.parametrize(
    'train_cfg', [None, {}, ITERATIONS, EPOCHS, dict(by_epoch=False, max_iters=3), dict(type='OwnLoop', max_x=0)]
)
def test_sound_lengths_and_loops_of_others_are_left_alone(train_cfg):
    check_length(train_cfg)
