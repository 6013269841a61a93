"""Transforms derived from MMDetection's."""

import copy

from mmcv.image.geometric import rescale_size
from mmdet.datasets.transforms import Resize as _Resize

from mmvim.registry import TRANSFORMS


@TRANSFORMS.register_module()
class Resize(_Resize):
    """MMDetection's Resize that leaves every side at least one pixel, so that very long and thin images work."""

    def transform(self, results: dict) -> dict:
        """Resize image, boxes, masks and label map of a sample."""
        scale = self.scale or self.scale_factor
        if self.keep_ratio and scale:
            width, height = rescale_size(results['img'].shape[1::-1], scale)
            if min(width, height) < 1:
                exact = copy.copy(self)
                exact.keep_ratio, exact.scale = False, (max(width, 1), max(height, 1))
                return super(Resize, exact).transform(results)
        return super().transform(results)
