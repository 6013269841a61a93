"""Cascade R-CNN's second stage with one place for the class count, and ViTDet's single mask head."""

import copy
from collections.abc import Sequence

import torch
from mmdet.models.roi_heads import CascadeRoIHead as _CascadeRoIHead
from mmdet.models.utils import empty_instances
from mmdet.registry import MODELS as DETECTION_MODELS
from mmdet.structures.bbox import bbox2roi
from mmengine.model import ModuleList
from torch import Tensor

from mmvim.registry import MODELS

# n boxes of all images of a batch

FIRST_BOX_STDS = (0.1, 0.1, 0.2, 0.2)


@MODELS.register_module()
class CascadeRoIHead(_CascadeRoIHead):
    """MMDetection's CascadeRoIHead (arXiv 1712.00726) configured in one place, with one mask head.

    ``num_classes`` reaches every box head and the mask head. ``bbox_head`` and ``train_cfg`` are single dicts; what
    differs from stage to stage follows from ``iou_thresholds``: the IoU that makes a box positive, and the spread of
    the box deltas, that of the first stage divided by the number of the stage.

    As in detectron2's ViTDet there is one mask head, trained on the boxes of the first stage and applied to the final
    ones; MMDetection's own class has one for each stage, trains all and averages their masks.

    Args:
        num_classes: classes without background.
        iou_thresholds: one per stage, in (0, 1).
        stage_loss_weights: weight of each stage's box losses; the mask loss has weight 1.
        bbox_head: one box head, without ``num_classes``.
        mask_head: the mask head, without ``num_classes``; None for boxes only.
        train_cfg: assigner and sampler of every stage, without the IoU thresholds; a list as in MMDetection is used
            as it is.
        kwargs: the other arguments of MMDetection's class, without ``num_stages``.

    Raises:
        ValueError: if num_classes is below 1 or the numbers of thresholds and weights differ.
    """

    def __init__(
        self,
        num_classes: int,
        bbox_head: dict,
        mask_head: dict | None = None,
        iou_thresholds: Sequence[float] = (0.5, 0.6, 0.7),
        stage_loss_weights: Sequence[float] = (1.0, 0.5, 0.25),
        train_cfg: dict | Sequence[dict] | None = None,
        **kwargs,
    ) -> None:
        if not isinstance(num_classes, int) or num_classes < 1:
            raise ValueError(f'num_classes must be an int of at least 1, got {num_classes!r}')
        if len(iou_thresholds) != len(stage_loss_weights):
            raise ValueError(
                'iou_thresholds and stage_loss_weights need one number per stage, got '
                f'{iou_thresholds} and {stage_loss_weights}'
            )
        self.num_classes = num_classes
        heads = []
        for stage in range(len(iou_thresholds)):
            head = copy.deepcopy(bbox_head)
            stds = [std / (stage + 1) for std in FIRST_BOX_STDS]
            head['bbox_coder'] = dict(type='DeltaXYWHBBoxCoder', target_means=[0.0] * 4, target_stds=stds)
            head['num_classes'] = num_classes
            heads.append(head)
        if mask_head is not None:
            mask_head = copy.deepcopy(mask_head)
            mask_head['num_classes'] = num_classes
        if isinstance(train_cfg, dict):
            train_cfg = [_with_iou(train_cfg, iou) for iou in iou_thresholds]
        super().__init__(
            num_stages=len(iou_thresholds),
            stage_loss_weights=stage_loss_weights,
            bbox_head=heads,
            mask_head=mask_head,
            train_cfg=train_cfg,
            **kwargs,
        )

    def init_mask_head(self, mask_roi_extractor: dict, mask_head: dict) -> None:
        """Build the mask head and what cuts out its input."""
        self.share_roi_extractor = False
        self.mask_head = ModuleList([DETECTION_MODELS.build(mask_head)])
        self.mask_roi_extractor = ModuleList([DETECTION_MODELS.build(mask_roi_extractor)])

    def _mask_forward(self, stage: int, x: tuple[Tensor, ...], rois: Tensor) -> dict:
        return super()._mask_forward(0, x, rois)

    def mask_loss(self, stage: int, *args) -> dict:
        """Mask loss of the first stage, nothing for the others."""
        return dict(loss_mask={}) if stage else super().mask_loss(stage, *args)

    def predict_mask(
        self, x: tuple[Tensor, ...], batch_img_metas: list[dict], results_list: list, rescale: bool = False
    ) -> list:
        """Add ``masks`` (n, H, W), bool, to the boxes (n, 4) predicted for each image."""
        counts = [len(result) for result in results_list]
        rois = bbox2roi([result.bboxes for result in results_list])
        if not len(rois):
            return empty_instances(
                batch_img_metas,
                rois.device,
                task_type='mask',
                instance_results=results_list,
                mask_thr_binary=self.test_cfg.mask_thr_binary,
            )
        return self.mask_head[0].predict_by_feat(
            mask_preds=self._mask_forward(0, x, rois)['mask_preds'].split(counts),
            results_list=results_list,
            batch_img_metas=batch_img_metas,
            rcnn_test_cfg=self.test_cfg,
            rescale=rescale,
        )

    def forward(self, x: tuple[Tensor, ...], rpn_results_list: list, batch_data_samples: list) -> tuple:
        """Raw outputs for the proposals of each image: class scores, box deltas and mask logits, without decoding."""
        metas = [sample.metainfo for sample in batch_data_samples]
        proposals = [result.bboxes for result in rpn_results_list]
        counts = tuple(len(boxes) for boxes in proposals)
        rois, scores, deltas = self._refine_roi(x, bbox2roi(proposals), metas, counts)
        if not self.with_mask:
            return scores, deltas
        return scores, deltas, self._mask_forward(0, x, torch.cat(rois))['mask_preds'].split(counts)


def _with_iou(train_cfg: dict, iou: float) -> dict:
    train_cfg = copy.deepcopy(train_cfg)
    train_cfg['assigner'].update(pos_iou_thr=iou, neg_iou_thr=iou, min_pos_iou=iou)
    return train_cfg
