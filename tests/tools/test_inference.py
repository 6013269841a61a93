"""A trained model on images of one's own, by the inferencers of the hosts, from the config in the work directory."""

import json
import shutil
from pathlib import Path

import cv2
import numpy as np
import pytest

from mmvim.tools import command_line
from mmvim.tools import test as test_tool
from mmvim.tools import train as tool

CONFIGS = Path(__file__).parents[2] / 'configs'
SEGMENTOR = """
_base_ = '{configs}/vim/upernet_vim-ti_folder.py'

width = 16
model = dict(
    backbone=dict(arch=dict(_delete_=True, embed_dims=width, depth=4), out_indices=(0, 1, 2, 3)),
    neck=dict(embed_dim=width),
    decode_head=dict(in_channels=[width] * 4, channels=width),
    auxiliary_head=dict(in_channels=width, channels=width),
)
loader = dict(num_workers=0, persistent_workers=False)
train_dataloader = dict(loader, batch_size=2)
val_dataloader = test_dataloader = loader
"""
CLASSIFIER = """
_base_ = '{configs}/vim/vim-ti_8xb128_in1k.py'

model = dict(
    backbone=dict(arch=dict(_delete_=True, embed_dims=16, depth=2), img_size=(48, 32)),
    head=dict(in_channels=16, num_classes=2),
    train_cfg=None,
)
pipeline = [dict(type='LoadImageFromFile'), dict(type='CenterCrop', crop_size=(32, 48)), dict(type='PackInputs')]
train_dataloader = test_dataloader = dict(
    _delete_=True,
    batch_size=2,
    num_workers=0,
    sampler=dict(type='DefaultSampler', shuffle=False),
    dataset=dict(type='CustomDataset', data_root='photos', pipeline=pipeline),
)
train_cfg = dict(max_epochs=1)
val_cfg = val_dataloader = val_evaluator = None
test_evaluator = dict(topk=1)
custom_hooks = param_scheduler = []
"""
SAME_NAMES = """
_base_ = 'tiny.py'
test_dataloader = dict(
    dataset=dict(
        _delete_=True, type='mmvim.CocoFolderDataset', data_root='same', ann_file='a.json', data_prefix=dict(img=''),
        pipeline={{_base_.test_pipeline}}, test_mode=True,
    )
)
test_evaluator = dict(_delete_=True, type='CocoMetric', metric=['bbox'], ann_file='same/a.json')
"""


@pytest.fixture
def here(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)


def pictures_of_a_test(run_tool, *more):
    """Pictures that tools/test.py says it drew with the checkpoint in work/."""
    (checkpoint,) = Path('work').glob('*.pth')
    arguments = ('--work-dir', 'work', '--show-dir', 'pictures', *more)
    finished = run_tool('test', 'work/c.py', checkpoint, *arguments, cwd=Path.cwd())
    assert finished.returncode == 0, finished.stderr
    folder = Path(finished.stdout.split('pictures are in ')[-1].strip())
    assert folder.is_relative_to(Path('work').resolve())
    return sorted(folder.iterdir())


def draw(path, values, size=(61, 47)):
    path = Path(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    cv2.imwrite(str(path), np.random.default_rng(0).integers(0, values, size).astype(np.uint8))


def train(text, *options):
    """Train the config; what it resolves to and the checkpoint are then in work/."""
    Path('c.py').write_text(text.format(configs=CONFIGS))
    arguments = ['c.py', '--work-dir', 'work', '--cfg-options', 'default_hooks.logger.interval=1', *options]
    command_line.run(tool, arguments)


def test_a_detector(trained, monkeypatch):
    from mmdet.apis import DetInferencer

    monkeypatch.chdir(trained[0])
    inferencer = DetInferencer('work/tiny.py', 'work/iter_4.pth', device='cpu')
    draw('photos/mine.png', 256, (61, 47, 3))
    (found,) = inferencer('photos/mine.png', out_dir='found', pred_score_thr=0)['predictions']
    assert len(found['bboxes']) == len(found['scores']) == len(found['masks']) == len(found['labels']) == 10
    boxes = np.array(found['bboxes'])
    assert (boxes >= 0).all() and (boxes <= [47, 61, 47, 61]).all()
    assert [mask['size'] for mask in found['masks']] == [[61, 47]] * 10
    assert inferencer.visualizer.dataset_meta['classes'] == ('circle', 'rectangle', 'triangle', 'star')
    drawn = cv2.imread('found/vis/mine.png').shape
    assert drawn[0] // 61 == drawn[1] // 47 >= 1  # small images are enlarged

    for folder, value in dict(a=40, b=200).items():
        Path('photos', folder).mkdir(exist_ok=True)
        cv2.imwrite(f'photos/{folder}/mine.png', np.full((61, 47, 3), value, np.uint8))
        inferencer(f'photos/{folder}/mine.png', out_dir='apart', no_save_pred=False)
    for folder, expected in dict(vis=['b_mine.png', 'mine.png'], preds=['b_mine.json', 'mine.json']).items():
        assert sorted(path.name for path in Path('apart', folder).iterdir()) == expected
    first, second = (cv2.imread(f'apart/vis/{name}').mean() for name in ('mine.png', 'b_mine.png'))
    assert first < 100 < 150 < second


def test_a_detector_draws_every_image_of_a_test(trained, monkeypatch, capfd):
    monkeypatch.chdir(trained[0])
    names = ['a/1.png', 'b/1.png', 'a/1.jpg']
    for name in names:
        draw(f'same/{name}', 256, (61, 47, 3))
    images = [dict(id=i, file_name=name, height=61, width=47) for i, name in enumerate(names)]
    kinds = [dict(id=i, name=name) for i, name in enumerate(['circle', 'rectangle', 'triangle', 'star'])]
    boxes = [
        dict(id=1, image_id=0, category_id=0, bbox=[1, 1, 9, 9], area=81, iscrowd=0, segmentation=[[1, 1, 9, 1, 9, 9]])
    ]
    Path('same/a.json').write_text(json.dumps(dict(images=images, annotations=boxes, categories=kinds)))
    Path('same.py').write_text(SAME_NAMES)
    arguments = ['same.py', 'work/iter_4.pth', '--work-dir', 'tested_same', '--show-dir', 'pictures']
    command_line.run(test_tool, arguments)
    folder = Path(capfd.readouterr().out.split('pictures are in ')[-1].strip())
    assert sorted(path.name for path in folder.iterdir()) == ['1.jpg', 'a_1.png', 'b_1.png']


def test_a_segmentor_of_a_folder_of_label_maps(here, run_tool):
    from mmseg.apis import MMSegInferencer, inference_model, init_model

    for split in ('train', 'val'):
        for folder in 'xy':
            draw(f'data/images/{split}/{folder}/0.png', 256, (61, 47, 3))
            draw(f'data/annotations/{split}/{folder}/0.png', 3)
    train(SEGMENTOR, 'data_root=data', 'img_suffix=.png', 'classes=[a,b,c]', 'image_size=64', 'max_iters=1')

    inferencer = MMSegInferencer('work/c.py', 'work/iter_1.pth', device='cpu')
    labels = inferencer('data/images/val/x/0.png', out_dir='found')['predictions']
    assert labels.shape == (61, 47) and set(np.unique(labels)) <= {0, 1, 2}
    assert cv2.imread('found/vis/0.png').shape == (61, 47, 3)
    assert list(inferencer.visualizer.dataset_meta['classes']) == ['a', 'b', 'c']
    (map_file,) = Path('found/pred').iterdir()
    assert (cv2.imread(str(map_file), cv2.IMREAD_UNCHANGED) == labels).all()

    model = init_model('work/c.py', 'work/iter_1.pth', device='cpu')
    again = inference_model(model, 'data/images/val/x/0.png')
    assert (again.pred_sem_seg.data[0].numpy() == labels).all()
    inferencer('data/images/val/y/0.png', out_dir='found')
    assert sorted(path.name for path in Path('found/vis').iterdir()) == ['0.png', 'y_0.png']
    pictures = pictures_of_a_test(run_tool, '--out', 'maps')
    assert [path.name for path in pictures] == ['test_x_0.png_1.png', 'test_y_0.png_2.png']
    assert sorted(path.name for path in Path('maps').iterdir()) == ['x_0.png', 'y_0.png']


def test_a_classifier(here, run_tool):
    from mmpretrain import ImageClassificationInferencer

    for name in 'ab':
        for i in range(2):
            draw(f'photos/{name}/{i}.png', 256, (61, 47, 3))
    train(CLASSIFIER)
    inferencer = ImageClassificationInferencer('work/c.py', 'work/epoch_1.pth', device='cpu')
    (found,) = inferencer('photos/a/0.png')
    assert found['pred_scores'].shape == (2,) and found['pred_scores'].sum() == pytest.approx(1)
    assert found['pred_class'] == 'ab'[found['pred_label']]
    names = [f'{name}_{i}.png' for name in 'ab' for i in range(2)]
    assert [path.name for path in pictures_of_a_test(run_tool)] == [f'{name}_0.png' for name in names]
    shutil.copy('photos/a/0.png', 'photos/a/0.v2.png')
    inferencer(['photos/a/0.png', 'photos/b/0.png', 'photos/a/0.v2.png'], show_dir='shown')
    inferencer([cv2.imread('photos/a/0.png')], show_dir='shown')
    assert len(list(Path('shown').iterdir())) == 4
