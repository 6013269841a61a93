"""Pictures of small images that can be looked at."""

import math

import cv2
import numpy as np
from mmdet.structures import DetDataSample
from mmdet.structures.mask import BitmapMasks, PolygonMasks
from mmdet.visualization import DetLocalVisualizer
from mmengine.structures import InstanceData

from mmvim.arguments import check_numbers, check_positive
from mmvim.registry import VISUALIZERS


@VISUALIZERS.register_module()
class EnlargingDetVisualizer(DetLocalVisualizer):
    """MMDetection's DetLocalVisualizer that enlarges small images first, so that labels do not hide the objects.

    Args:
        name: name by which mmengine keeps it.
        min_side: images with a shorter side below this get a whole-numbered factor that brings it there, pixels.
        max_side: but none that makes the longer side exceed this, pixels.
        alpha: opacity of masks and outlines.
        line_width: width of outlines, pixels.
        kwargs: arguments of DetLocalVisualizer.

    Raises:
        ValueError: if a number has no legal value, or min_side is above max_side.
    """

    def __init__(
        self,
        name: str = 'visualizer',
        min_side: int = 384,
        max_side: int = 2048,
        alpha: float = 0.5,
        line_width: float = 2,
        **kwargs,
    ) -> None:
        check_numbers(min_side=min_side, max_side=max_side)
        if min_side > max_side:
            raise ValueError(f'min_side must be at most max_side, got {min_side} and {max_side}')
        check_positive(line_width=line_width)
        if type(alpha) not in (int, float) or not 0 <= alpha <= 1:
            raise ValueError(f'alpha must be in [0, 1], got {alpha!r}')
        super().__init__(name=name, alpha=alpha, line_width=line_width, **kwargs)
        self.min_side, self.max_side = min_side, max_side

    def add_datasample(self, name: str, image: np.ndarray, data_sample: DetDataSample | None = None, **kwargs) -> None:
        """Draw one image (H, W, 3), uint8, red first, with truth and predictions; see the base class."""
        shorter, longer = sorted(image.shape[:2])
        factor = max(1, min(math.ceil(self.min_side / shorter), self.max_side // longer))
        if factor > 1:
            image = cv2.resize(image, None, fx=factor, fy=factor, interpolation=cv2.INTER_NEAREST)
            data_sample = None if data_sample is None else _enlarge(data_sample.cpu(), factor)
        super().add_datasample(name, image, data_sample, **kwargs)


def _enlarge(sample: DetDataSample, factor: int) -> DetDataSample:
    sample = sample.clone()
    for part in ('gt_instances', 'pred_instances'):
        if part in sample:
            setattr(sample, part, _enlarge_instances(getattr(sample, part), factor))
    return sample


def _enlarge_instances(instances: InstanceData, factor: int) -> InstanceData:
    enlarged = instances.clone()
    if 'bboxes' in instances:
        enlarged.bboxes = getattr(instances.bboxes, 'tensor', instances.bboxes) * factor
    if 'masks' in instances:
        masks = instances.masks
        if isinstance(masks, BitmapMasks | PolygonMasks):
            enlarged.masks = masks.resize((masks.height * factor, masks.width * factor))
        else:
            enlarged.masks = masks.repeat_interleave(factor, -1).repeat_interleave(factor, -2)
    return enlarged
