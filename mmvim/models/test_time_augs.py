"""Merging of predictions for flipped images."""

import torch
from mmcv.ops import batched_nms
from mmdet.models.test_time_augs import DetTTAModel
from mmdet.structures import DetDataSample
from mmdet.structures.bbox import bbox_flip
from mmengine.structures import InstanceData

from mmvim.registry import MODELS

FLIPPED_AXES = dict(horizontal=(-1,), vertical=(-2,), diagonal=(-2, -1))


@MODELS.register_module()
class InstanceTTAModel(DetTTAModel):
    """MMDetection's DetTTAModel for boxes with masks as well.

    Boxes of all views are turned back and joined by NMS; each box that stays keeps its own mask.
    """

    def _merge_single_sample(self, data_samples: list[DetDataSample]) -> DetDataSample:
        views = [_unflipped(sample) for sample in data_samples]
        merged = InstanceData.cat(views)
        result = data_samples[0]
        if len(merged):
            boxes, keep = batched_nms(merged.bboxes, merged.scores, merged.labels, self.tta_cfg.nms)
            merged = merged[keep[: self.tta_cfg.max_per_img]]
            merged.bboxes, merged.scores = boxes[: len(merged), :4], boxes[: len(merged), 4]
        result.pred_instances = merged
        return result


def _unflipped(sample: DetDataSample) -> InstanceData:
    """Predictions of one view in the coordinates of the original image."""
    predictions, meta = sample.pred_instances, sample.metainfo
    if not meta['flip']:
        return predictions
    view = InstanceData(scores=predictions.scores, labels=predictions.labels)
    view.bboxes = bbox_flip(predictions.bboxes, meta['ori_shape'], meta['flip_direction'])
    if 'masks' in predictions:
        view.masks = torch.flip(predictions.masks, FLIPPED_AXES[meta['flip_direction']])
    return view
