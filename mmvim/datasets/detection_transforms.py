"""Transforms derived from MMDetection's."""

import copy

from mmcv.image.geometric import rescale_size
from mmdet.datasets.transforms import Resize as _Resize

from mmvim.registry import TRANSFORMS

SHORTEST = 2  # pixels


@TRANSFORMS.register_module()
class Resize(_Resize):
    """MMDetection's Resize that leaves every side at least two pixels, so that very long and thin images work.

    None would be left of some; and one row or column, flipped, is an array that torch does not take.
    """

    def transform(self, results: dict) -> dict:
        """Resize image, boxes, masks and label map of a sample."""
        scale = self.scale or self.scale_factor
        if self.keep_ratio and scale:
            width, height = rescale_size(results['img'].shape[1::-1], scale)
            if min(width, height) < SHORTEST:
                exact = copy.copy(self)
                exact.keep_ratio, exact.scale = False, (max(width, SHORTEST), max(height, SHORTEST))
                return super(Resize, exact).transform(results)
        return super().transform(results)
