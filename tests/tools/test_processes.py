"""Two processes on a CPU, started by torchrun as a user does, against one with the same total batch."""

import json
import os
import re
import signal
import subprocess
import sys
import time
from pathlib import Path

import cv2
import numpy as np
import pytest

REPOSITORY = Path(__file__).parents[2]
HOOKS = """
import json
import os

from mmengine.dist import get_rank
from mmengine.hooks import Hook
from mmengine.registry import HOOKS


@HOOKS.register_module()
class Record(Hook):
    def before_run(self, runner):
        self.losses = []
        with open(f'{runner.work_dir}/pid_{get_rank()}', 'w') as file:
            file.write(str(os.getpid()))

    def before_train_iter(self, runner, batch_idx, data_batch=None):
        if os.environ.get('BREAK') == f'{get_rank()} {runner.iter}':
            next(runner.model.parameters()).data.fill_(float('nan'))

    def after_train_iter(self, runner, batch_idx, data_batch=None, outputs=None):
        self.losses.append({name: float(value) for name, value in outputs.items()})
        with open(f'{runner.work_dir}/losses_{get_rank()}.json', 'w') as file:
            json.dump(self.losses, file)
"""
CONFIG = """
_base_ = '{repository}/configs/vim/upernet_vim-ti_camvid-240x180.py'
custom_imports = dict(imports=['record'])
custom_hooks = [dict(type='Record')]

width, num_classes = 16, 3
norm_cfg = dict(_delete_=True, type='{norm}'{groups})
heads = dict(channels=width, num_classes=num_classes, ignore_index=255, norm_cfg=norm_cfg, dropout_ratio=0.0)
model = dict(
    data_preprocessor=dict(size=(64, 64)),
    backbone=dict(
        arch=dict(_delete_=True, embed_dims=width, depth=4), img_size=64, out_indices=(0, 1, 2, 3), drop_path_rate=0.0
    ),
    neck=dict(embed_dim=width, norm_cfg=norm_cfg),
    decode_head=dict(in_channels=[width] * 4, **heads),
    auxiliary_head=dict(in_channels=width, **heads),
)
load, labels, pack = dict(type='LoadImageFromFile'), dict(type='LoadAnnotations'), dict(type='PackSegInputs')
dataset = dict(
    data_root='data', metainfo=dict(classes=('a', 'b', 'c')), ignore_index=255, pipeline=[load, labels, pack]
)
loader = dict(num_workers=0, persistent_workers=False, dataset=dataset)
train_dataloader = dict(batch_size=4, sampler=dict(type='{sampler}'), **loader)
val_dataloader = test_dataloader = loader
val_evaluator = test_evaluator = dict(ignore_index=255)
train_cfg = dict(max_iters={iterations}, val_interval=100000)
param_scheduler = []
default_hooks = dict(logger=dict(interval=1), checkpoint=dict(interval=100000))
optim_wrapper = dict(_delete_=True, type='OptimWrapper', optimizer=dict(type='SGD', lr=0.5))
randomness = dict(seed=0)
"""


@pytest.fixture
def start(tmp_path):
    """Start a training in so many processes; returns the process and its work directory."""
    random = np.random.default_rng(0)
    for split in ('train', 'val'):
        for i in range(8):
            kinds = dict(images=random.integers(0, 256, (64, 64, 3)), annotations=random.integers(0, 3, (64, 64)))
            for kind, picture in kinds.items():
                path = tmp_path / 'data' / kind / split / f'{i}.png'
                path.parent.mkdir(parents=True, exist_ok=True)
                cv2.imwrite(str(path), picture.astype(np.uint8))
    (tmp_path / 'record.py').write_text(HOOKS)

    def start(processes, *options, norm='GN', sampler='InfiniteSampler', iterations=6):
        groups = ', num_groups=4' if norm == 'GN' else ''
        text = CONFIG.format(repository=REPOSITORY, norm=norm, groups=groups, sampler=sampler, iterations=iterations)
        (tmp_path / 'c.py').write_text(text)
        command = [sys.executable, '-W', 'ignore']
        if processes > 1:
            command += ['-m', 'torch.distributed.run', f'--nproc_per_node={processes}', '--standalone']
        command += [REPOSITORY / 'tools' / 'train.py', 'c.py', '--device', 'cpu', '--work-dir', f'work{processes}']
        command += ['--launcher', 'pytorch'] if processes > 1 else []
        command += ['--cfg-options', f'train_dataloader.batch_size={4 // processes}', *options]
        environment = os.environ | {'PYTHONPATH': os.pathsep.join([str(tmp_path), *sys.path]), 'OMP_NUM_THREADS': '1'}
        pipes = dict(stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True)
        return subprocess.Popen(command, cwd=tmp_path, env=environment, **pipes), tmp_path / f'work{processes}'

    return start


def finish(started):
    process, work = started
    output, _ = process.communicate(timeout=500)
    assert process.returncode == 0, output[-4000:]
    return output, work


@pytest.mark.slow
@pytest.mark.parametrize(('norm', 'sampler'), [('GN', 'InfiniteSampler'), ('GN', 'DefaultSampler')])
def test_losses_are_those_of_one_process_with_the_same_total_batch(start, norm, sampler):
    found = []
    for processes in (1, 2):
        output, work = finish(start(processes, norm=norm, sampler=sampler))
        ranks = [json.loads((work / f'losses_{rank}.json').read_text()) for rank in range(processes)]
        found.append([np.mean([rank[i]['loss'] for rank in ranks]) for i in range(6)])
    differences = np.abs(np.subtract(*found))
    print(f'largest difference of the losses {differences.max():.2e}: {found[0]}')
    assert differences.max() < 1e-6
    assert len(set(found[0])) == 6


@pytest.mark.slow
@pytest.mark.parametrize('norm', ['BN', 'SyncBN'])
def test_statistics_of_each_process_alone_are_warned_of_once(start, norm):
    output, _ = finish(start(2, norm=norm, iterations=1))
    (line,) = [line for line in output.splitlines() if 'layers of BatchNorm' in line]
    assert 'statistics in each of 2 processes alone' in line and 'neck.' in line and 'decode_head.' in line


@pytest.mark.slow
@pytest.mark.parametrize('killed', [0, 1])
def test_a_killed_process_ends_the_job_with_one_line(start, killed):
    process, work = start(2, 'default_hooks.logger.interval=100000', iterations=100000)
    losses = [work / f'losses_{rank}.json' for rank in range(2)]
    while not all(file.is_file() for file in losses) and process.poll() is None:
        time.sleep(0.5)
    began = time.monotonic()
    os.kill(int((work / f'pid_{killed}').read_text()), signal.SIGKILL)
    output, _ = process.communicate(timeout=120)
    took = time.monotonic() - began
    print(f'{output[-6000:]}\nended after {took:.1f} s')
    assert process.returncode != 0 and took < 30
    (line,) = [line for line in output.splitlines() if line.startswith('error')]
    assert line.startswith(f'error (process {1 - killed}): the connection to another process of this run has broken')
    assert 'Traceback' not in output.split('error (process')[0]


@pytest.mark.slow
@pytest.mark.parametrize('clip', ['=None', '.max_norm=1.0'])
@pytest.mark.parametrize('broken', [0, 1])
def test_a_loss_of_one_process_stops_all(start, monkeypatch, broken, clip):
    """The launcher ends the others as soon as one has ended, perhaps before they can say why."""
    monkeypatch.setenv('BREAK', f'{broken} 2')
    process, work = start(2, 'default_hooks.checkpoint.interval=1', f'optim_wrapper.clip_grad{clip}')
    output, _ = process.communicate(timeout=500)
    lines = re.findall(r'error \(process \d\): .*', output)  # the processes write at the same time
    assert lines, output[-6000:]
    for line in lines:
        assert 'loss is nan, ' in line and ' in iteration 3 (images data/' in line
        assert line.startswith(
            (f'error (process {broken}): ', f'error (process {1 - broken}): process {broken} stopped: ')
        )
    assert sorted(file.name for file in work.glob('*.pth')) == ['iter_1.pth', 'iter_2.pth']
