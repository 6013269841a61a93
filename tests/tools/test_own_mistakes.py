"""The tools on data of one's own that is broken or odd: one line and nothing trained, or a run that learns."""

import copy
import json
import math
import re
import shutil
from pathlib import Path

import cv2
import numpy as np
import pytest

HEIGHT, WIDTH = 64, 96
DETECTOR = """
_base_ = '{repository}/configs/vim/cascade_mask_rcnn_vim_ti_folder.py'

width, channels = 16, 16
image_size, max_iters = 64, 2
model = dict(
    backbone=dict(arch=dict(_delete_=True, embed_dims=width, depth=1), drop_path_rate=0.0),
    neck=dict(in_channels=width, out_channels=channels),
    rpn_head=dict(in_channels=channels, feat_channels=channels),
    roi_head=dict(
        bbox_roi_extractor=dict(out_channels=channels),
        bbox_head=dict(in_channels=channels, conv_out_channels=channels, fc_out_channels=32),
        mask_roi_extractor=dict(out_channels=channels),
        mask_head=dict(in_channels=channels, conv_out_channels=channels),
    ),
    train_cfg=dict(rpn_proposal=dict(nms_pre=50, max_per_img=20)),
    test_cfg=dict(rpn=dict(nms_pre=50, max_per_img=20), rcnn=dict(score_thr=0.0, max_per_img=5)),
)
train_dataloader = dict(num_workers=1, persistent_workers=False)
val_dataloader = dict(num_workers=0, persistent_workers=False)
test_dataloader = val_dataloader
train_cfg = dict(val_interval=1000)
default_hooks = dict(logger=dict(interval=1))
"""
KEYS = ('train_ann=train.json', 'val_ann=val.json', 'train_img=images', 'val_img=images', 'data_root=data')


def square(x, y, side=24):
    return [[x, y, x + side, y, x + side, y + side, x, y + side]]


@pytest.fixture
def data(tmp_path):
    """A folder with c.py and data of two classes; returns the content of its annotation files."""
    repository = Path(__file__).parents[2]
    (tmp_path / 'c.py').write_text(DETECTOR.format(repository=repository))
    (tmp_path / 'data' / 'images').mkdir(parents=True)
    content = dict(images=[], annotations=[], categories=[dict(id=7, name='fig'), dict(id=3, name='date')])
    for i in range(4):
        picture = np.full((HEIGHT, WIDTH, 3), 30, np.uint8)
        for j, category in enumerate((7, 3)):
            x, y = 8 + 40 * j, 10 + 4 * i
            picture[y : y + 24, x : x + 24, j] = 220
            entry = dict(id=2 * i + j + 1, image_id=i, category_id=category, bbox=[x, y, 24, 24], area=576, iscrowd=0)
            content['annotations'].append({**entry, 'segmentation': square(x, y)})
        cv2.imwrite(str(tmp_path / 'data' / 'images' / f'{i}.png'), picture)
        content['images'].append(dict(id=i, file_name=f'{i}.png', height=HEIGHT, width=WIDTH))
    return content


@pytest.fixture
def run(tmp_path, run_tool, data):
    """Write the annotation files, the last one changed, and run a tool; returns status and output."""

    def run(change=None, split='train', tool='train', options=(), checkpoint=()):
        for name in ('train', 'val'):
            content = copy.deepcopy(data)
            if name == split and change:
                change(content)
            (tmp_path / 'data' / f'{name}.json').write_text(json.dumps(content))
        arguments = ('c.py', *checkpoint, '--work-dir', 'work', '--cfg-options', *KEYS, *options)
        finished = run_tool(tool, *arguments, cwd=tmp_path)
        return finished.returncode, finished.stdout + finished.stderr

    return run


def of_all(**changes):
    return lambda content: [entry.update(changes) for entry in content['annotations']]


def first(**changes):
    return lambda content: content['annotations'][0].update(changes)


@pytest.mark.slow
@pytest.mark.parametrize('split', ['train', 'val'])
@pytest.mark.parametrize(
    'change, message',
    [
        (first(bbox=[math.nan, 1, 2, 3]), r'annotation 1 has the bbox \[nan, 1, 2, 3\]'),
        (first(segmentation=[[1, 2, 3, 4]]), r'annotation 1: polygon \[1, 2, 3, 4\]'),
        (first(segmentation=dict(size=[WIDTH, HEIGHT], counts='PP')), 'annotation 1: RLE size'),
        (first(segmentation=dict(size=[HEIGHT, WIDTH], counts='oooo')), 'annotation 1: RLE counts'),
        (first(category_id='7'), "annotation 1 has category_id the text '7'"),
        (of_all(segmentation=None), "annotations have no 'segmentation'"),
    ],
)
def test_a_broken_file_ends_in_one_line_before_training(run, split, change, message):
    status, output = run(change, split)
    last = output.strip().splitlines()[-1]
    assert status == 1 and last.startswith('error: ') and re.search(rf"data/{split}\.json'.*{message}", last), output
    assert 'Traceback' not in output and 'Iter(train)' not in output


@pytest.mark.slow
def test_odd_files_learn_boxes_and_masks(run, tmp_path):
    def odd(content):
        content['categories'] = [dict(id=7, name=1), dict(id=3, name=2), dict(id=9, name='left out')]
        content['annotations'][0].update(segmentation=square(8, 10)[0], area=0)
        content['annotations'][1].pop('iscrowd')
        content['annotations'][2]['iscrowd'] = 1
        content['images'][0]['height'] = 64.0

    status, output = run(odd, options=('classes=[2,1]',))
    assert status == 1 and "val.json' has classes ['fig', 'date'] that the model does not know" in output
    shutil.rmtree(tmp_path / 'work')
    status, output = run(odd, options=('classes=[2,1]', 'val_ann=train.json'))
    assert status == 0, output
    assert min(map(float, re.findall(r's0\.loss_mask: ([\d.]+)', output))) > 0
    assert "the classes ['left out'] are left out" in output and '1 crowd regions' in output
    test = dict(tool='test', checkpoint=('work',), options=('val_ann=train.json', 'classes=[2,1]'))
    status, output = run(odd, **test)
    assert status == 0 and 'coco/segm_mAP' in output, output


@pytest.mark.slow
def test_images_of_16_bits_are_named(run, tmp_path):
    for path in (tmp_path / 'data' / 'images').glob('*.png'):
        cv2.imwrite(str(path), cv2.imread(str(path), 0).astype(np.uint16) * 16)
    status, output = run()
    assert status == 0 and re.search('WARNING.*has 16 bits per value .* set value_range', output), output
    shutil.rmtree(tmp_path / 'work')
    status, output = run(options=('value_range=[0,3520]',))
    assert status == 0 and '16 bits' not in output, output


@pytest.mark.slow
@pytest.mark.parametrize('shape', [(64, 96), (64, 96, 1), (64, 96, 4)])
def test_grey_arrays_in_the_inferencer(run, tmp_path, run_python, shape):
    assert run()[0] == 0
    script = f"""
import numpy as np, mmvim
from mmdet.apis import DetInferencer, inference_detector, init_detector
config, weights = '{tmp_path}/work/c.py', '{tmp_path}/work/iter_2.pth'
find = DetInferencer(config, weights, device='cpu', show_progress=False)
array = np.full({shape}, 100, np.uint8)
result = find(array, out_dir='{tmp_path}/found')
print('found', len(result['predictions'][0]['scores']))
model = init_detector(config, weights, palette='random', device='cpu')
print('found', len(inference_detector(model, array).pred_instances))
"""
    assert run_python(script).count('found 5') == 2
    assert list((tmp_path / 'found' / 'vis').glob('*.jpg'))
