"""Wrong input ends a tool with status 1 and one line that names what is wrong; nothing saved is touched."""

import json
import re

import cv2
import pytest
import torch
from mmengine.dataset import default_collate
from torch.utils.data import DataLoader

from mmvim.errors import DataError
from mmvim.tools import command_line, test, train
from mmvim.tools.errors import explain


@pytest.fixture
def fails(trained, monkeypatch, capsys):
    """Run a tool in the folder of the trained config; returns its one line of error."""
    folder, _ = trained
    monkeypatch.chdir(folder)

    def run(tool, *arguments):
        before = {path: path.read_bytes() for path in (folder / 'work').glob('*') if path.is_file()}
        with pytest.raises(SystemExit) as ended:
            command_line.run(train if tool == 'train' else test, arguments)
        assert ended.value.code == 1
        error = capsys.readouterr().err.strip().splitlines()[-1]
        assert error.startswith('error: ')
        assert 'Traceback' not in error
        assert {path: path.read_bytes() for path in before} == before
        return error

    return run


def test_a_finished_run_is_not_overwritten(fails):
    error = fails('train', 'tiny.py', '--work-dir', 'work')
    assert "'work' already holds checkpoints (iter_4.pth): continue with --resume, or choose another" in error


def test_missing_config(fails):
    assert 'did you mean cascade_mask_rcnn_vim_ti_coco.py' in fails('train', 'vim/cascade_mask_rcnn_vim_t_coco.py')


@pytest.mark.parametrize(
    'text, expected',
    [
        ('model = dict(', "config 'bad.py', line 1"),
        ("_base_ = './gone.py'", 'gone.py'),
        ("_base_ = './tiny.py'\nmodel = dict(neck=3)", 'wrong config key: cfg should be a dict'),
        ("_base_ = './tiny.py'\noptim_wraper = dict()", "'optim_wraper'; did you mean 'optim_wrapper'"),
        ('x = undefined', "name 'undefined' is not defined"),
    ],
)
def test_configs_that_cannot_be_read(fails, tiny_folder, text, expected):
    (tiny_folder / 'bad.py').write_text(text)
    assert expected in fails('train', 'bad.py', '--work-dir', 'new')


@pytest.mark.parametrize(
    'option, expected',
    [
        ('optim_wraper.optimizer.lr=1', "no key 'optim_wraper'; did you mean 'optim_wrapper'?"),
        ('frobnicate=1', "no key 'frobnicate'"),
        ('model.test_cfg.rcnn.score_thrs=0.1', "did you mean 'model.test_cfg.rcnn.score_thr'?"),
        ('param_scheduler.end=3', "'param_scheduler' is a list of 2; name an entry by its number"),
        ('width=32', 'nothing in this config takes its value from there'),
        ('model.backbone.drop_path=0.1', 'wrong config key: VisionMamba.__init__() got an unexpected keyword argument'),
        ('model.backbone.type=mmvim.VisionMabma', "type 'mmvim.VisionMabma', which no registry has"),
        ('model.backbone.type=mmvim.VisionMabma', 'did you mean mmvim.VisionMamba?'),
        ('model.backbone.directions=v3', "directions must be one of ('v2', 'v1', 'none', 'block', 'sequence')"),
        ('model.roi_head.num_classes=3', 'has 3 classes, but the data set of train_dataloader has 4 (circle, '),
        ('optim_wrapper.clip_grad=dict(max_norm=1)', 'wrong value in the config: If `clip_grad` is not None'),
        ('train_dataloader.dataset.shapes.num_train=0', 'must be at least 1'),
        ('train_dataloader.dataset.shapes.seed=5', 'holds shapes generated with other settings'),
    ],
)
def test_options_that_nothing_reads(fails, option, expected):
    assert expected in fails('train', 'tiny.py', '--work-dir', 'new', '--cfg-options', option)


def test_other_arguments(fails):
    if not torch.cuda.is_available():
        assert 'torch sees no GPU here' in fails('train', 'tiny.py', '--device', 'cuda')
    assert 'auto_scale_lr=dict(base_batch_size=...)' in fails(
        'train', 'tiny.py', '--auto-scale-lr', '--work-dir', 'new'
    )
    assert 'ends in .pkl' in fails('test', 'tiny.py', 'work/iter_4.pth', '--out', 'out.json')


def test_a_batch_of_images_of_different_sizes():
    with pytest.raises(RuntimeError) as raised:
        default_collate([dict(inputs=torch.zeros(3, 8, 8)), dict(inputs=torch.zeros(3, 8, 9))])
    assert 'the images of a batch differ in size' in explain(raised.value)


@pytest.fixture
def coco_folder(tmp_path, trained):
    """The shapes of the tiny config as a plain COCO folder, without a third of the classes."""
    root = trained[0] / 'data' / 'shapes'
    content = json.loads((root / 'annotations' / 'train.json').read_text())
    (tmp_path / 'train.json').write_text(json.dumps(content))
    (tmp_path / 'images').symlink_to(root / 'train')
    return tmp_path


def folder_options(root, *more):
    files = ('train_ann=train.json', 'val_ann=train.json', 'train_img=images', 'val_img=images')
    small = (
        'image_size=64',
        'max_iters=1',
        'train_dataloader.num_workers=0',
        'train_dataloader.persistent_workers=False',
    )
    return ('--work-dir', root / 'work', '--cfg-options', f'data_root={root}', *files, *small, *more)


FOLDER = 'vim/cascade_mask_rcnn_vim_ti_folder.py'


def test_coco_folder_files(fails, coco_folder):
    def error(*more):
        return fails('train', FOLDER, *folder_options(coco_folder, *more))

    assert "data folder 'nowhere' does not exist" in error(
        'data_root=nowhere', 'train_ann=' + str(coco_folder / 'train.json')
    )
    assert "gone.json' does not exist" in error('train_ann=gone.json')
    assert 'num_classes=3, but the annotation file has 4 classes (circle, ' in error('num_classes=3')
    (coco_folder / 'train.json').write_text('{}')
    assert "train.json' names no classes" in error()


def test_missing_coco(fails):
    error = fails('train', 'vim/cascade_mask_rcnn_vim_ti_coco.py', '--work-dir', 'new')
    assert "data folder 'data/coco/' of CocoDataset does not exist" in error
    error = fails('train', 'vim/cascade_mask_rcnn_vim_ti_coco.py', '--work-dir', 'new', '--cfg-options', 'data_root=x')
    assert 'set train_dataloader.dataset.data_root and val_dataloader.dataset.data_root and ' in error


def test_checkpoints(fails, tiny_folder):
    torch.save(dict(state_dict=dict(weight=torch.zeros(3))), tiny_folder / 'other.pth')
    (tiny_folder / 'text.pth').write_text('hello')
    (tiny_folder / 'empty').mkdir()
    whole = (tiny_folder / 'work' / 'iter_4.pth').read_bytes()
    (tiny_folder / 'half.pth').write_bytes(whole[: len(whole) // 2])
    wrong = {
        'gone.pth': "'gone.pth' does not exist",
        'other.pth': "'other.pth' does not fit the model of this config",
        'text.pth': "'text.pth' is no checkpoint",
        'half.pth': "'half.pth' is no checkpoint, or a damaged or incomplete one",
    }
    for name, expected in wrong.items():
        assert expected in fails('test', 'tiny.py', name, '--work-dir', 'new')
        expected = 'does not say at which iteration and epoch it was saved' if name == 'other.pth' else expected
        assert expected in fails('train', 'tiny.py', '--resume', name, '--work-dir', 'new')
    depth = ('--cfg-options', 'model.backbone.arch.depth=2')
    assert 'the file has depth 1, the model 2' in fails(
        'test', 'tiny.py', 'work/iter_4.pth', '--work-dir', 'new', *depth
    )
    classes = ('--cfg-options', 'model.roi_head.num_classes=5')
    error = fails('test', 'tiny.py', 'work/iter_4.pth', '--work-dir', 'new', *classes)
    assert 'does not fit' in error
    assert re.search(r'roi_head\.bbox_head\.0\.fc_cls\.weight \(5, \d+\) in the file, \(6, \d+\) in the model', error)


def test_a_bad_image_in_a_worker_process_gives_one_line(fails, coco_folder):
    images = coco_folder / 'pictures'
    images.mkdir()
    for path in (coco_folder / 'images').iterdir():
        (images / path.name).write_bytes(path.read_bytes()[:200])
    options = folder_options(coco_folder, 'train_img=pictures', 'train_dataloader.num_workers=1')
    error = fails('train', FOLDER, *options)
    assert error.startswith("error: image '") and 'cannot be read' in error


class Failing:
    """A data set whose samples raise an error."""

    def __init__(self, error):
        self.error = error

    def __len__(self):
        return 1

    def __getitem__(self, index):
        raise self.error


@pytest.mark.parametrize(
    'error',
    [
        FileNotFoundError(2, 'No such file or directory', 'a/b.png'),
        PermissionError(13, 'Permission denied', 'b.png'),
        OSError('image file is truncated (3 bytes b.png not processed)'),
        ValueError('first\n  second b.png'),
        KeyError('b.png'),
        IndexError('b.png'),
        TypeError('b.png'),
        AssertionError('failed to load image: b.png'),
        UnicodeDecodeError('utf-8', b'b.png', 0, 1, 'b.png'),
        DataError("image 'b.png' is empty"),
        cv2.error('OpenCV(4) b.png in\n function resize'),
    ],
    ids=lambda error: type(error).__name__,
)
def test_an_error_of_a_loaders_worker_is_one_line(error):
    with pytest.raises(Exception) as raised:
        next(iter(DataLoader(Failing(error), num_workers=1)))
    line = explain(raised.value)
    assert 'b.png' in line and '\n' not in line and 'Traceback' not in line and 'File "' not in line
