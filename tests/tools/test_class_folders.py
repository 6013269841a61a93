"""A classifier on a folder of images per class: train, test, predict, and what a mistake ends in."""

from pathlib import Path

import cv2
import numpy as np
import pytest

from mmvim.tools import command_line
from mmvim.tools import test as test_tool
from mmvim.tools import train as train_tool

MODEL = """
_base_ = '{configs}/vim/vim-ti_folder.py'

model = dict(
    backbone=dict(arch=dict(_delete_=True, embed_dims=24, depth=2), patch_size=8, img_size={size}),
    head=dict(in_channels=24),
)
train_dataloader = dict(batch_size=8, num_workers=0, persistent_workers=False)
val_dataloader = dict(batch_size=8, num_workers=0, persistent_workers=False)
optim_wrapper = dict(optimizer=dict(lr=3e-3))
train_cfg = dict(val_interval=40)
default_hooks = dict(logger=dict(interval=20))
randomness = dict(seed=0)
max_iters = 40
"""
OWN = "data_root, image_size = 'data', 32"
HOSTS = """
model['head']['num_classes'] = 3
data_preprocessor = dict(num_classes=3)
for split, loader in (('train', train_dataloader), ('val', val_dataloader)):
    steps = [dict(type='LoadImageFromFile'), dict(type='Resize', scale=(32, 32)), dict(type='PackInputs')]
    loader['dataset'] = dict(_delete_=True, type='CustomDataset', data_root=f'data/{split}', pipeline=steps)
del split, loader, steps
"""


def write(folder, text, size):
    model = MODEL.format(configs=Path(__file__).parents[2] / 'configs', size=size)
    (folder / 'c.py').write_text(model + text)


@pytest.fixture
def folder(tmp_path, monkeypatch):
    """A folder with config and data, in which the tools run: images of three colours."""
    rng = np.random.default_rng(0)
    for split in ('train', 'val'):
        for channel, name in enumerate(('blue', 'green', 'red')):
            for i in range(6):
                picture = rng.integers(0, 90, (40, 48, 3)).astype(np.uint8)
                picture[..., channel] += 120
                path = tmp_path / 'data' / split / name / f'{i}.png'
                path.parent.mkdir(parents=True, exist_ok=True)
                cv2.imwrite(str(path), picture)
    write(tmp_path, OWN, 224)
    monkeypatch.chdir(tmp_path)
    return tmp_path


def run(tool, *arguments):
    command_line.run(tool, ['c.py', *arguments, '--work-dir', 'work', '--device', 'cpu'])


@pytest.mark.slow
def test_train_test_and_predict(folder, capfd):
    run(train_tool)
    assert float(capfd.readouterr().out.rpartition('accuracy/top1: ')[2].split()[0]) > 80
    command_line.run(test_tool, ['work/c.py', 'work', '--work-dir', 'work', '--device', 'cpu'])
    assert float(capfd.readouterr().out.rpartition('accuracy/top1: ')[2].split()[0]) > 80
    from mmpretrain import ImageClassificationInferencer

    inferencer = ImageClassificationInferencer('work/c.py', pretrained='work/iter_40.pth', device='cpu')
    assert inferencer('data/val/green/0.png')[0]['pred_class'] == 'green'


@pytest.mark.parametrize(
    'damage, text, options, expected',
    [
        ('val/red', OWN, [], "has folders of classes that the model does not know: ['pink']"),
        ('train/red/3.png', OWN, [], "train/red/3.png' cannot be read"),
        ('train/red/3.png', HOSTS, ['train_dataloader.num_workers=1'], "3.png' fails in LoadImageFromFile"),
        ('val/red', HOSTS, [], "val_dataloader has the classes ['blue', 'green', 'pink'] (3), train_dataloader ["),
        (None, OWN, ['num_classes=4'], 'num_classes=4, but there are 3 classes (blue, green, red)'),
        (None, OWN, ['train_img=gone'], "image folder 'data/gone' does not exist"),
    ],
)
def test_a_mistake_ends_in_one_line_before_training(folder, capsys, damage, text, options, expected):
    path = folder / 'data' / (damage or '')
    if damage and path.is_dir():
        path.rename(path.with_name('pink'))
    elif damage:
        path.write_bytes(b'no picture')
    write(folder, text, 224 if text is OWN else 32)
    with pytest.raises(SystemExit) as ended:
        run(train_tool, '--cfg-options', 'default_hooks.logger.interval=1', *options)
    line = capsys.readouterr().err.strip().splitlines()[-1]
    assert ended.value.code == 1 and line.startswith('error: ') and expected in line
