import pickle
import re
import shutil
import subprocess
from pathlib import Path

import cv2
import numpy as np
import pytest
import torch

from mmvim.tools import command_line, test, train


def lines(output, start):
    return [line for line in output.splitlines() if start in line]


def metrics(output):
    """The last metrics that a tool printed, by name."""
    return dict(re.findall(r'(coco/\w+): ([-\d.]+)', lines(output, 'coco/bbox_mAP:')[-1]))


def test_training_shows_losses_and_the_time_left_and_saves(trained):
    folder, output = trained
    steps = lines(output, 'Iter(train) [')
    assert len(steps) == 4
    assert all(re.search(r'eta: \d+:\d\d:\d\d', step) for step in steps)
    losses = [float(re.search(r' loss: ([\d.]+)', step).group(1)) for step in steps]
    assert np.isfinite(losses).all()
    assert sorted(path.name for path in (folder / 'work').glob('*.pth')) == ['iter_2.pth', 'iter_4.pth']
    assert re.search(r'coco/bbox_mAP_50: .*coco/segm_mAP_50: ', lines(output, 'Iter(val) [2/2]')[-1])


def test_checkpoints_know_their_classes_and_positions(trained):
    checkpoint = torch.load(trained[0] / 'work' / 'iter_4.pth', weights_only=False)
    assert checkpoint['meta']['dataset_meta']['classes'] == ('circle', 'rectangle', 'triangle', 'star')
    assert checkpoint['meta']['iter'] == 4


def test_a_resumed_run_is_the_unbroken_run(run_tool, trained, tmp_path):
    """With flips, stochastic depth and boxes sampled at random."""
    folder, _ = trained
    (tmp_path / 'work').mkdir()
    shutil.copy(folder / 'work' / 'iter_2.pth', tmp_path / 'work')
    finished = run_tool('train', 'tiny.py', '--work-dir', tmp_path / 'work', '--resume', cwd=folder)
    assert finished.returncode == 0, finished.stderr
    assert [step.split('[')[1][0] for step in lines(finished.stdout, 'Iter(train) [')] == ['3', '4']
    first = torch.load(folder / 'work' / 'iter_4.pth', weights_only=False)
    second = torch.load(tmp_path / 'work' / 'iter_4.pth', weights_only=False)
    assert first['optimizer']['param_groups'][0]['lr'] == second['optimizer']['param_groups'][0]['lr']
    assert first['param_schedulers'] == second['param_schedulers']
    assert {state['step'].item() for state in second['optimizer']['state'].values()} == {4}
    assert first['state_dict'].keys() == second['state_dict'].keys()
    assert [
        name for name, value in first['state_dict'].items() if not torch.equal(value, second['state_dict'][name])
    ] == []
    start = torch.load(folder / 'work' / 'iter_2.pth', weights_only=False)['state_dict']
    name = 'backbone.layers.0.mixer.in_proj.weight'
    assert not torch.equal(start[name], second['state_dict'][name])


def test_testing_gives_the_numbers_of_the_training_run_pictures_and_predictions(run_tool, trained):
    folder, trained_output = trained
    expected = metrics(trained_output)
    arguments = ('--work-dir', 'tested', '--show-dir', 'pictures', '--out', 'out.pkl')
    finished = run_tool('test', 'tiny.py', 'work/iter_4.pth', *arguments, cwd=folder)
    assert finished.returncode == 0, finished.stderr
    assert all('eta:' in line for line in lines(finished.stdout, 'Iter(test) [')[:-1])
    assert metrics(finished.stdout) == expected
    pictures = sorted((folder / 'tested').glob('*/pictures/*.png'))
    assert [picture.name for picture in pictures] == ['000000.png', '000001.png', '000002.png']
    for picture in pictures:
        image = cv2.imread(str(picture))
        assert image.shape[1] >= 2 * image.shape[0], 'truth and prediction stand side by side'
    predictions = pickle.loads((folder / 'out.pkl').read_bytes())
    assert [p['img_id'] for p in predictions] == [1, 2, 3]
    assert predictions[0]['pred_instances']['bboxes'].shape[1] == 4


@pytest.fixture
def run_here(trained, monkeypatch, capfd):
    """Run a tool in this process, in the folder of the tiny config; returns what it prints."""
    monkeypatch.chdir(trained[0])

    def run(tool, *arguments):
        command_line.run(train if tool == 'train' else test, arguments)
        return capfd.readouterr().out

    return run


def test_test_time_augmentation_runs_with_masks(run_here):
    output = run_here('test', 'tiny.py', 'work', '--work-dir', 'tta', '--tta')
    assert {'coco/bbox_mAP_50', 'coco/segm_mAP_50'} <= set(metrics(output))
    assert 'work/iter_4.pth' in output, 'a work directory stands for its last checkpoint'


@pytest.mark.parametrize('dtype', ['bfloat16', pytest.param('float16', marks=pytest.mark.slow)])
def test_mixed_precision_trains_on_a_cpu(run_here, dtype):
    options = ('--cfg-options', 'max_iters=2', 'val_cfg=None', 'val_dataloader=None', 'val_evaluator=None')
    output = run_here('train', 'tiny.py', '--work-dir', dtype, '--amp', '--amp-dtype', dtype, *options)
    steps = lines(output, 'Iter(train) [')
    assert len(steps) == 2
    assert 'nan' not in ''.join(steps)
    state = torch.load(f'{dtype}/iter_2.pth', weights_only=False)['optimizer']['loss_scaler']
    assert bool(state) == (dtype == 'float16')


def test_a_run_can_start_from_a_checkpoint_with_other_heads(run_here):
    more = ('load_from=work/iter_4.pth', 'model.roi_head.bbox_head.fc_out_channels=8')
    output = run_here('train', 'tiny.py', '--work-dir', 'tuned', '--cfg-options', 'max_iters=2', *more)
    (warning,) = lines(output, 'WARNING - checkpoint: ')
    assert 'of another shape' in warning and 'fc_cls' in warning
    assert len(lines(output, 'Iter(train) [')) == 2


@pytest.mark.slow
def test_two_processes_on_a_cpu_train_together(run_tool, trained):
    arguments = ('--launcher', 'pytorch', '--device', 'cpu', '--work-dir', 'two', '--cfg-options', 'max_iters=2')
    finished = run_tool('train', 'tiny.py', *arguments, cwd=trained[0], processes=2)
    assert finished.returncode == 0, finished.stderr
    assert len(lines(finished.stdout, 'Iter(train) [')) == 2
    assert (trained[0] / 'two' / 'iter_2.pth').is_file()


@pytest.mark.parametrize('script', ['dist_train.sh', 'dist_test.sh', 'slurm_train.sh', 'slurm_test.sh'])
def test_shell_scripts_explain_themselves(script):
    tools = Path(__file__).parent.parent.parent / 'tools'
    finished = subprocess.run([tools / script], capture_output=True, text=True)
    assert finished.returncode == 2
    assert finished.stderr.startswith('usage: ')


@pytest.mark.slow
def test_several_processes_resume_as_one_does(run_tool, tiny_folder, tmp_path):
    arguments = ('--launcher', 'pytorch', '--device', 'cpu')
    finished = run_tool('train', 'tiny.py', '--work-dir', tmp_path / 'whole', *arguments, cwd=tiny_folder, processes=2)
    assert finished.returncode == 0, finished.stderr
    (tmp_path / 'work').mkdir()
    shutil.copy(tmp_path / 'whole' / 'iter_2.pth', tmp_path / 'work')
    resume = ('--work-dir', tmp_path / 'work', '--resume', *arguments)
    finished = run_tool('train', 'tiny.py', *resume, cwd=tiny_folder, processes=2)
    assert finished.returncode == 0, finished.stderr
    first, second = (torch.load(tmp_path / run / 'iter_4.pth', weights_only=False) for run in ('whole', 'work'))
    assert all(torch.equal(value, second['state_dict'][name]) for name, value in first['state_dict'].items())
    finished = run_tool('train', 'tiny.py', *resume[:3], cwd=tiny_folder)
    assert 'processes was 2 and is 1 now' in finished.stdout
