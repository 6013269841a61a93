"""Whatever writes a checkpoint in a run, a process that ends at any moment leaves a complete one."""

import builtins
import os
from pathlib import Path

import pytest
import torch
from mmengine.dataset import DefaultSampler
from mmengine.evaluator import BaseMetric
from mmengine.hooks import Hook
from mmengine.model import BaseModel
from mmengine.runner import Runner
from torch import nn
from torch.utils.data import DataLoader

import mmvim  # noqa: F401
from mmvim.weights.writing import remove_unfinished, save_atomically


class Model(BaseModel):
    def __init__(self):
        super().__init__()
        self.layer = nn.Linear(2, 1)

    def forward(self, inputs, mode='tensor'):
        loss = self.layer(torch.stack(inputs)).square().mean()
        return dict(loss=loss) if mode == 'loss' else [loss]


class Rising(BaseMetric):
    """Better at every validation, so that each replaces the best checkpoint."""

    value = 0

    def process(self, data_batch, data_samples):
        self.results.append(0)

    def compute_metrics(self, results):
        Rising.value += 1
        return dict(acc=Rising.value)


def train(work_dir, max_iters=4, hooks=(), **hook):
    images = [dict(inputs=torch.ones(2))] * 4
    loader = DataLoader(
        images, sampler=DefaultSampler(images), collate_fn=lambda batch: dict(inputs=[b['inputs'] for b in batch])
    )
    runner = Runner(
        Model(),
        str(work_dir),
        loader,
        train_cfg=dict(by_epoch=False, max_iters=max_iters, val_interval=1),
        val_dataloader=loader,
        val_cfg={},
        val_evaluator=[Rising()],
        optim_wrapper=dict(optimizer=dict(type='SGD', lr=0.1)),
        default_hooks=dict(checkpoint=dict(type='CheckpointHook', interval=1, by_epoch=False, **hook)),
        custom_hooks=[dict(type='EMAHook'), *hooks],
        experiment_name=f'{work_dir.parent.name}-{work_dir.name}',
        log_level='ERROR',
    )
    lines = []
    runner.logger.warning = lambda text, *args: lines.append(text)
    runner.train()
    return lines


def complete(folder):
    """Names of the checkpoints in a folder; each must be complete."""
    names = sorted(file.name for file in folder.glob('*.pth'))
    for name in names:
        assert torch.load(folder / name, weights_only=False)['state_dict']
    return names


@pytest.mark.parametrize('keep', [1, 2])
def test_whenever_a_run_ends_a_complete_checkpoint_is_there(tmp_path, monkeypatch, keep):
    """Looks at the work directory at every call that changes a file, which is where a kill could come between."""
    folder, seen = tmp_path / 'work', []

    def look(name, path):
        seen.append((name, Path(path).name, complete(folder)))
        last = folder / 'last_checkpoint'
        if last.exists():
            assert last.read_text(), seen[-1]

    def watch(name, module):
        original = getattr(module, name)

        def call(path, *args, **kwargs):
            inside = str(path).startswith(str(folder)) and (name != 'open' or 'w' in str(args))
            try:
                return original(path, *args, **kwargs)
            finally:
                if inside:
                    look(name, path)

        monkeypatch.setattr(module, name, call)

    for name in ('replace', 'remove', 'unlink'):
        watch(name, os)
    watch('open', builtins)
    train(folder, max_keep_ckpts=keep, save_best='acc', published_keys=['state_dict', 'meta'])
    first = next(i for i, (_, _, names) in enumerate(seen) if any(n.startswith('iter_') for n in names))
    assert all(any(n.startswith('iter_') for n in names) for _, _, names in seen[first:]), seen
    first_best = next(i for i, (_, _, names) in enumerate(seen) if any('best' in n for n in names))
    assert all(any('best' in n for n in names) for _, _, names in seen[first_best:]), seen
    left = [n for n in complete(folder) if '-' not in n]  # published ones have a dash
    assert left == ['best_acc_iter_4.pth', *[f'iter_{i}.pth' for i in range(5 - keep, 5)]]
    assert Path((folder / 'last_checkpoint').read_text()).name == 'iter_4.pth'
    assert sum('-' in n for n in complete(folder)) == 2
    assert not list(folder.glob('*.unfinished'))


class Own:
    pass


class Keeping(Hook):
    def before_save_checkpoint(self, runner, checkpoint):
        checkpoint['meta']['own'] = Own()


def test_a_run_says_at_its_first_checkpoint_that_it_cannot_be_read(tmp_path):
    def named(folder, hooks):
        return [line for line in train(folder, hooks=hooks) if 'neither --resume nor a test' in line]

    (line,) = named(tmp_path / 'own', [Keeping()])
    assert 'iter_1.pth' in line and 'Own' in line and '\n' not in line
    assert named(tmp_path / 'plain', []) == []


def test_a_file_that_cannot_be_written_leaves_the_old_one(tmp_path):
    path = tmp_path / 'a.pth'
    save_atomically({'a': 1}, path)
    with pytest.raises((AttributeError, TypeError)):
        save_atomically({'a': torch.ones(9), 'b': lambda: 0}, path)
    assert torch.load(path) == {'a': 1}
    assert os.listdir(tmp_path) == ['a.pth']


def test_what_a_killed_process_left_half_written_is_removed_at_the_next_start(tmp_path):
    folder = tmp_path / 'work'
    folder.mkdir()
    (folder / 'iter_9.pth.123.unfinished').write_bytes(b'half')
    (folder / 'last_checkpoint.123.unfinished').write_bytes(b'')
    (folder / 'notes.txt').write_text('mine')
    train(folder, max_iters=1)
    assert not list(folder.glob('*.unfinished')) and (folder / 'notes.txt').exists()
    assert remove_unfinished(folder) == []
