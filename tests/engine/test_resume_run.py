"""A run that was interrupted ends bit for bit as the unbroken one, whatever in it is random.

`small_run.py` draws from Python, NumPy and torch in its augmentation, mixup, dropout, stochastic depth and validation.
"""

import shutil

import pytest
import torch

from mmvim.errors import CheckpointError, ConfigError

slow = pytest.mark.slow
INFINITE = dict(sampler=dict(type='InfiniteSampler'))
RUNS = {
    'iterations': dict(end=8),
    'iterations, 2 workers': dict(end=8, workers=2),
    'infinite, 1 worker': dict(sampler=INFINITE, workers=1),
    'epochs': dict(by_epoch=True, end=3, interval=(1, True)),
    'within an epoch, 1 worker': dict(by_epoch=True, end=2, interval=4, workers=1),
    'accumulation': dict(accumulate=3, end=8, sampler=INFINITE),
    'one cycle': dict(param_scheduler=[dict(type='OneCycleLR', eta_max=0.1, total_steps=8, by_epoch=False)]),
    'batches of one shape': dict(
        sampler=dict(**INFINITE, batch_sampler=dict(type='mmdet.AspectRatioBatchSampler')), workers=1
    ),
    'batches of one shape, several passes': dict(
        sampler=dict(sampler=dict(type='DefaultSampler'), batch_sampler=dict(type='mmdet.AspectRatioBatchSampler')),
        end=12,
    ),
    'classes in turn': dict(
        sampler=dict(sampler=dict(type='mmdet.ClassAwareSampler')), by_epoch=True, end=2, interval=3
    ),
    'repeated augmentation': dict(
        sampler=dict(sampler=dict(type='mmpretrain.RepeatAugSampler')), by_epoch=True, end=2, interval=(1, True)
    ),
}
FAST = ('within an epoch, 1 worker',)


def checkpoints(folder):
    return sorted(folder.glob('*.pth'), key=lambda file: int(file.stem.rpartition('_')[2]))


@pytest.mark.parametrize(
    'settings', [pytest.param(RUNS[key], id=key, marks=[slow] * (key not in FAST)) for key in RUNS]
)
def test_a_resumed_run_is_the_unbroken_run(tmp_path, small_run, settings):
    small_run.train(tmp_path / 'whole', **settings)
    *early, last = checkpoints(tmp_path / 'whole')
    for file in early:
        folder = tmp_path / file.stem
        folder.mkdir()
        shutil.copy(file, folder)
        assert small_run.differences(file, last)
        torch.manual_seed(0)
        small_run.train(folder, **settings, resume='auto')
        assert small_run.differences(folder / last.name, last) == []


@pytest.mark.slow
def test_the_number_of_workers_changes_nothing(tmp_path, small_run):
    for workers in (0, 2):
        small_run.train(tmp_path / str(workers), workers=workers, end=4, seed=3, sampler=INFINITE)
    assert small_run.differences(tmp_path / '0' / 'iter_4.pth', tmp_path / '2' / 'iter_4.pth') == []


def best(**more):
    return dict(checkpoint=dict(type='CheckpointHook', interval=2, by_epoch=False, save_best='acc', **more))


STOPPING = [
    dict(type='EMAHook'),
    dict(type='EarlyStoppingHook', monitor='acc', rule='greater', min_delta=9, patience=2),
]


@pytest.mark.parametrize(
    'settings',
    [
        dict(end=4),
        pytest.param(dict(default_hooks=best(rule='less')), marks=slow),
        pytest.param(dict(custom_hooks=STOPPING, end=12), marks=slow),
    ],
    ids=['plain', 'best', 'early stopping'],
)
def test_a_resumed_run_validates_what_the_unbroken_run_does(tmp_path, small_run, settings):
    """Also where the run was killed after saving and before or while validating."""
    settings = dict(dict(end=6, sampler=INFINITE, seed=1), **settings)
    whole = small_run.train(tmp_path / 'whole', **settings)
    (tmp_path / 'work').mkdir()
    shutil.copy(tmp_path / 'whole' / 'iter_2.pth', tmp_path / 'work')
    resumed = small_run.train(tmp_path / 'work', **settings, resume='auto')
    assert resumed.iter == whole.iter
    ours, theirs = (run.message_hub.get_scalar('val/acc').data[0].tolist() for run in (resumed, whole))
    assert ours == theirs


@pytest.fixture(scope='module')
def done(tmp_path_factory, small_run):
    """The work directory of a run of 4 iterations."""
    folder = tmp_path_factory.mktemp('done') / 'work'
    small_run.train(folder, end=4, seed=3, sampler=INFINITE)
    return folder


@pytest.fixture
def resume(done, tmp_path, small_run, monkeypatch):
    """Go on with that run in a copy of its work directory; returns the runner and its warnings."""

    def run(change=lambda checkpoint: None, **settings):
        shutil.rmtree(tmp_path / 'work', ignore_errors=True)
        shutil.copytree(done, tmp_path / 'work')
        for file in checkpoints(tmp_path / 'work'):
            checkpoint = torch.load(file, weights_only=False)
            change(checkpoint)
            torch.save(checkpoint, file)
        runner = small_run.Runner.from_cfg(
            small_run.config(tmp_path / 'work', **{**dict(end=4, sampler=INFINITE, resume='auto'), **settings})
        )
        warnings = []
        monkeypatch.setattr(runner.logger, 'warning', lambda text, *args, **kwargs: warnings.append(text))
        runner.train()
        return runner, warnings

    return run


def test_a_longer_schedule_wins(tmp_path, small_run, resume):
    """Learning rates are those of a run that was meant to be that long from the start, from the next iteration on."""
    _, warnings = resume(end=8)
    (line,) = [line for line in warnings if 'schedul' in line]
    assert 'CosineAnnealingLR.T_max was 4 and is 8' in line and 'max_iters was 4 and is 8' in line and '\n' not in line
    small_run.train(tmp_path / 'long', end=8, seed=3, sampler=INFINITE)
    for name in ('iter_6.pth', 'iter_8.pth'):
        ours, theirs = (torch.load(tmp_path / run / name, weights_only=False) for run in ('work', 'long'))
        assert ours['param_schedulers'] == theirs['param_schedulers']
        assert ours['optimizer']['param_groups'] == theirs['optimizer']['param_groups']
    assert not any('bit for bit' in line for line in warnings)


def test_changed_settings_are_named_and_win(resume):
    runner, warnings = resume(end=6, optim_wrapper=dict(optimizer=dict(type='AdamW', lr=0.5, weight_decay=0.2)))
    (line,) = [line for line in warnings if 'the config wins' in line]
    assert 'lr was 0.01 and is 0.5' in line and 'weight_decay was 0.1 and is 0.2' in line
    group = runner.optim_wrapper.param_groups[0]
    assert group['initial_lr'] == 0.5 and group['weight_decay'] == 0.2 and group['lr'] > 0.01


@pytest.mark.slow
def test_a_schedule_by_metric_goes_on_where_it_was(tmp_path, small_run):
    plateau = dict(type='ReduceOnPlateauLR', monitor='acc', rule='greater', patience=0, threshold=9, factor=0.5)
    settings = dict(by_epoch=True, interval=(1, True), param_scheduler=[plateau], seed=1)
    small_run.train(tmp_path / 'long', end=3, **settings)
    small_run.train(tmp_path / 'work', end=2, **settings)
    small_run.train(tmp_path / 'work', end=3, **settings, resume='auto')
    assert small_run.differences(tmp_path / 'work' / 'epoch_3.pth', tmp_path / 'long' / 'epoch_3.pth') == []


def test_another_batch_size_is_named(resume, small_run):
    loader = {**small_run.loader(sampler=dict(type='InfiniteSampler')), 'batch_size': 3}
    _, warnings = resume(end=6, train_dataloader=loader)
    assert any('batch_size was 2 and is 3 now' in line for line in warnings)


def test_an_end_before_the_checkpoint_is_refused(resume):
    with pytest.raises(ConfigError, match=r'saved after 4 iters, but train_cfg.max_iters is 3: raise max_iters'):
        resume(end=3)
    _, warnings = resume()
    assert any('the run has ended after 4 iters' in line for line in warnings)


SGD = dict(optimizer=dict(type='SGD', lr=0.1, momentum=0.9))
REFUSED = {
    'no meta': (lambda c: c.pop('meta'), {}, 'does not say at which iteration'),
    'no optimiser': (lambda c: c.pop('optimizer'), {}, 'no state of the optimiser'),
    'no schedulers': (lambda c: c.pop('param_schedulers'), {}, 'no state of the parameter schedulers'),
    'other optimiser': (lambda c: None, dict(optim_wrapper=SGD), "its optimiser is AdamW, the config's SGD"),
    'other optimiser of a foreign file': (
        lambda c: c.pop('mmvim_run'),
        dict(optim_wrapper=SGD),
        "its optimiser is another one.*the config's SGD",
    ),
    'fewer groups': (
        lambda c: c['optimizer']['param_groups'][0]['params'].pop(),
        {},
        'the state of its optimiser does not fit',
    ),
    'other model': (lambda c: c['state_dict'].pop('head.1.weight'), {}, 'does not fit the model'),
}


@pytest.mark.parametrize('given', [pytest.param('auto', marks=slow), 'file'])
@pytest.mark.parametrize('kind', REFUSED)
def test_a_checkpoint_of_another_kind_is_refused_in_one_line(resume, tmp_path, kind, given):
    change, settings, message = REFUSED[kind]
    named = dict(resume=True, load_from=str(tmp_path / 'work' / 'iter_4.pth')) if given == 'file' else {}
    with pytest.raises(CheckpointError, match=message) as error:
        resume(change, **settings, **named)
    assert (
        'load_from=FILE in place of --resume' in str(error.value)
        or 'Move them away' in str(error.value)
        or kind == 'other model'
    )
    assert '\n' not in str(error.value)


def test_a_damaged_file_is_skipped_in_a_run(tmp_path, resume, done, small_run):
    for name in ('iter_2.pth', 'iter_4.pth'):
        shutil.copy(done / name, tmp_path / name)
    folder = tmp_path / 'again'
    folder.mkdir()
    shutil.copy(done / 'iter_2.pth', folder)
    (folder / 'iter_4.pth').write_bytes((done / 'iter_4.pth').read_bytes()[:5000])
    (folder / 'last_checkpoint').write_text('')
    small_run.train(folder, end=4, sampler=INFINITE, resume='auto')
    assert small_run.differences(folder / 'iter_4.pth', done / 'iter_4.pth') == []


def test_a_run_without_checkpoints_begins(tmp_path, small_run, done):
    runner = small_run.train(
        tmp_path / 'new', end=2, sampler=INFINITE, resume='auto', load_from=str(done / 'iter_4.pth')
    )
    assert runner.iter == 2 and runner._load_from.endswith('iter_4.pth')
