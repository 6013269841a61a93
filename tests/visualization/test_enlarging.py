import cv2
import numpy as np
import pytest
import torch
from mmdet.registry import VISUALIZERS
from mmdet.structures import DetDataSample
from mmdet.structures.mask import BitmapMasks
from mmengine.structures import InstanceData


@pytest.mark.parametrize('height, width, factor', [(64, 96, 6), (7, 3000, 1), (1, 1, 384), (600, 800, 1)])
def test_small_images_grow_with_their_objects(tmp_path, height, width, factor):
    mask = np.zeros((1, height, width), np.uint8)
    mask[0, : height // 2 + 1, : width // 2 + 1] = 1
    box = torch.tensor([[0.0, 0, width // 2 + 1, height // 2 + 1]])
    sample = DetDataSample()
    sample.gt_instances = InstanceData(bboxes=box, labels=torch.tensor([0]), masks=BitmapMasks(mask, height, width))
    sample.pred_instances = InstanceData(
        bboxes=box, labels=torch.tensor([0]), scores=torch.tensor([0.9]), masks=torch.from_numpy(mask).bool()
    )
    visualizer = VISUALIZERS.build(dict(type='mmvim.EnlargingDetVisualizer', name=f'{height}x{width}'))
    visualizer.dataset_meta = dict(classes=('fig',), palette=[(255, 0, 0)])
    grey = np.full((height, width, 3), 128, np.uint8)
    visualizer.add_datasample('image', grey, sample, out_file=str(tmp_path / 'out.png'))
    drawn = cv2.imread(str(tmp_path / 'out.png')).astype(int)
    assert drawn.shape == (height * factor, 2 * width * factor, 3)
    for half in np.split(drawn, 2, axis=1):
        red = (half[..., 2] - half[..., 0] > 60).mean()
        assert 0.05 < red < 1.01
    assert sample.gt_instances.bboxes is box and (grey == 128).all()
