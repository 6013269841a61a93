"""Cascade R-CNN's second stage with one place for the class count, ViTDet's single mask head and its training."""

import copy
from collections.abc import Callable, Iterable, Sequence

import torch
from mmdet.models.roi_heads import CascadeRoIHead as _CascadeRoIHead
from mmdet.models.task_modules import AssignResult, PseudoSampler, SamplingResult
from mmdet.models.utils import empty_instances
from mmdet.registry import MODELS as DETECTION_MODELS
from mmdet.structures.bbox import bbox2roi
from mmengine.config import ConfigDict
from mmengine.model import ModuleList
from mmengine.structures import InstanceData
from torch import Tensor

from mmvim.arguments import check_flags, check_numbers
from mmvim.compat.types import kind_of
from mmvim.registry import MODELS, TASK_UTILS

# n boxes of all images of a batch

IOU_THRESHOLDS = (0.5, 0.6, 0.7)
FIRST_CODER = dict(type='DeltaXYWHBBoxCoder', target_means=[0.0] * 4, target_stds=[0.1, 0.1, 0.2, 0.2])


class ScaleGradient(torch.autograd.Function):
    """The identity, whose gradient is multiplied by a factor."""

    @staticmethod
    def forward(ctx, x: Tensor, factor: float) -> Tensor:
        """The input."""
        ctx.factor = factor
        return x.view_as(x)

    @staticmethod
    def backward(ctx, gradient: Tensor) -> tuple[Tensor, None]:
        """The gradient times the factor."""
        return gradient * ctx.factor, None


@TASK_UTILS.register_module()
class AllBoxesSampler(PseudoSampler):
    """Take every box that has an area, and add no ground truth: detectron2's later stages of a cascade."""

    def sample(
        self, assign_result: AssignResult, pred_instances: InstanceData, gt_instances: InstanceData, **kwargs
    ) -> SamplingResult:
        """Positive and negative boxes of one image; a box without an area overlaps nothing and is negative."""
        left, top, right, bottom = pred_instances.priors.unbind(-1)
        assign_result.gt_inds[(right <= left) | (bottom <= top)] = -1  # neither positive nor negative
        return super().sample(assign_result, pred_instances, gt_instances)


@MODELS.register_module()
class CascadeRoIHead(_CascadeRoIHead):
    """MMDetection's CascadeRoIHead (arXiv 1712.00726) configured in one place, trained as in detectron2's ViTDet.

    ``num_classes`` reaches every box head and the mask head. ``bbox_head`` and ``train_cfg`` may be single dicts; what
    then differs from stage to stage follows from ``iou_thresholds``, the IoU that makes a box positive, and from the
    first stage's box coder, whose ``target_stds`` are divided by the number of the stage.

    As in detectron2's ViTDet, which the released Vim detectors use,

    - there is one mask head, trained on the boxes of the first stage and applied to the final ones; MMDetection's own
      class has one for each stage, trains all and averages their masks;
    - the box losses of all stages have weight 1, and the gradient that each stage sends into the pooled features is
      divided by the number of stages; MMDetection's configs have the weights 1, 0.5 and 0.25;
    - boxes are sampled for the first stage only: the others take all refined boxes with an area, ground truth that was
      sampled for the first among them, and match them anew; MMDetection samples from them in every stage, with the
      ground truth put in again.

    ``stage_loss_weights=(1, 0.5, 0.25), scale_gradient=False, resample=True`` is MMDetection's way.

    Args:
        bbox_roi_extractor: what cuts out the input of the box heads; one dict, or a list with one per stage.
        bbox_head: the box heads; one dict, or a list with one per stage, each of which may have a box coder.
        num_classes: classes without background; the ``num_classes`` of the heads if None.
        mask_roi_extractor: what cuts out the mask head's input; that of the first box head if None.
        mask_head: the mask head, one dict; None for boxes only.
        num_stages: number of stages; that of ``iou_thresholds``, ``stage_loss_weights`` or the lists if None, or 3.
        iou_thresholds: one per stage, in (0, 1); those of a list ``train_cfg``, or 0.5, 0.6 and 0.7 if None.
        stage_loss_weights: weight of each stage's losses, at least 0; 1 for all if None. The mask head's is the first.
        scale_gradient: divide the gradient into the pooled features of the boxes by the number of stages.
        resample: sample boxes in every stage. None means not for a single ``train_cfg``, and as it says for a list.
        train_cfg: assigner and sampler of every stage, without ``pos_iou_thr``; or a list with those of each stage.
        kwargs: ``test_cfg`` and ``init_cfg``.

    Raises:
        ValueError: if an argument has no legal value, or contradicts another; the message names both.
    """

    def __init__(
        self,
        bbox_roi_extractor: dict | Sequence[dict],
        bbox_head: dict | Sequence[dict],
        num_classes: int | None = None,
        mask_roi_extractor: dict | None = None,
        mask_head: dict | None = None,
        num_stages: int | None = None,
        iou_thresholds: Sequence[float] | None = None,
        stage_loss_weights: Sequence[float] | None = None,
        scale_gradient: bool = True,
        resample: bool | None = None,
        train_cfg: dict | Sequence[dict] | None = None,
        **kwargs,
    ) -> None:
        if kwargs.pop('shared_head', None) is not None:
            raise ValueError('roi_head.shared_head is not supported in a cascade: leave it out')
        _check_dicts('bbox_roi_extractor', bbox_roi_extractor, several=True)
        _check_dicts('bbox_head', bbox_head, several=True)
        for name, part in (('mask_head', mask_head), ('mask_roi_extractor', mask_roi_extractor)):
            if part is not None:
                _check_dicts(name, part)
        check_flags(scale_gradient=scale_gradient)
        if resample is not None:
            check_flags(resample=resample)
        count = _number_of_stages(
            num_stages=num_stages,
            iou_thresholds=iou_thresholds,
            stage_loss_weights=stage_loss_weights,
            bbox_head=bbox_head,
            bbox_roi_extractor=bbox_roi_extractor,
            train_cfg=train_cfg,
        )
        _check_numbers('iou_thresholds', iou_thresholds, lambda x: 0 < x < 1, 'in (0, 1)')
        _check_numbers('stage_loss_weights', stage_loss_weights, lambda x: x >= 0, 'of at least 0')
        if iou_thresholds is None and not _is_list(train_cfg) and count != len(IOU_THRESHOLDS):
            raise ValueError(f'{count} stages need roi_head.iou_thresholds, one for each')
        heads = list(bbox_head) if _is_list(bbox_head) else [bbox_head] * count
        heads = [_with_coder(head, stage, _is_list(bbox_head)) for stage, head in enumerate(heads)]
        classes = _number_of_classes(num_classes, bbox_head, mask_head)
        for head in heads:
            head['num_classes'] = classes
        if mask_head is not None:
            mask_head = copy.deepcopy(mask_head)
            mask_head['num_classes'] = classes
        self.num_classes = classes
        self.resample = _is_list(train_cfg) if resample is None else resample
        self.scale_gradient = scale_gradient
        super().__init__(
            num_stages=count,
            stage_loss_weights=stage_loss_weights or (1.0,) * count,
            bbox_roi_extractor=bbox_roi_extractor,
            bbox_head=heads,
            mask_roi_extractor=mask_roi_extractor,
            mask_head=mask_head,
            train_cfg=_stage_cfgs(train_cfg, iou_thresholds, count, self.resample),
            **kwargs,
        )

    def init_mask_head(self, mask_roi_extractor: dict | None, mask_head: dict) -> None:
        """Build the mask head and what cuts out its input."""
        self.share_roi_extractor = mask_roi_extractor is None
        self.mask_head = ModuleList([DETECTION_MODELS.build(mask_head)])
        self.mask_roi_extractor = (
            self.bbox_roi_extractor
            if self.share_roi_extractor
            else ModuleList([DETECTION_MODELS.build(mask_roi_extractor)])
        )

    def _bbox_forward(self, stage: int, x: tuple[Tensor, ...], rois: Tensor) -> dict:
        extractor = self.bbox_roi_extractor[stage]
        features = extractor(x[: extractor.num_inputs], rois)
        if self.scale_gradient:
            features = ScaleGradient.apply(features, 1 / self.num_stages)
        scores, deltas = self.bbox_head[stage](features)
        return dict(cls_score=scores, bbox_pred=deltas, bbox_feats=features)

    def bbox_loss(self, stage: int, x: tuple[Tensor, ...], sampling_results: list[SamplingResult]) -> dict:
        """Outputs and losses of the box head of a stage."""
        results = super().bbox_loss(stage, x, sampling_results)
        if not self.resample:
            for result in sampling_results:  # else the host drops ground truth, which the next sampler would add again
                result.pos_is_gt = torch.zeros_like(result.pos_is_gt)
        return results

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


def _is_list(value: object) -> bool:
    return isinstance(value, list | tuple)


def _check_dicts(name: str, value: object, several: bool = False) -> None:
    """Refuse what is no config of a part, or of one part per stage."""
    parts = list(value) if several and isinstance(value, list | tuple) else [value]
    if not parts or not all(isinstance(part, dict) for part in parts):
        legal = 'a dict, or a list with one for each stage' if several else 'one dict, not one for each stage'
        more = "; MMDetection's own CascadeRoIHead has a mask head for each stage" if name == 'mask_head' else ''
        raise ValueError(f'roi_head.{name} must be {legal}, got {value!r}{more}')


def _check_numbers(name: str, values: Iterable | None, is_legal: Callable[[float], bool], legal: str) -> None:
    if values is not None and not all(type(value) in (int, float) and is_legal(value) for value in values):
        raise ValueError(f'roi_head.{name} must be one number {legal} per stage, got {values!r}')


def _number_of_stages(num_stages: int | None, **lists: object) -> int:
    """What ``num_stages`` and the arguments with one entry per stage agree on."""
    if num_stages is not None:
        check_numbers(num_stages=num_stages)
    for name in ('iou_thresholds', 'stage_loss_weights'):
        if lists[name] is not None and not _is_list(lists[name]):
            raise ValueError(f'roi_head.{name} must be one number per stage, got {lists[name]!r}')
    counts = {f'{name} has {len(value)}': len(value) for name, value in lists.items() if _is_list(value)}
    if num_stages is not None:
        counts = {f'num_stages is {num_stages}': num_stages, **counts}
    if len(set(counts.values())) > 1 or 0 in counts.values():
        raise ValueError(f'roi_head needs one entry per stage everywhere: {", ".join(counts)}')
    return next(iter(counts.values()), len(IOU_THRESHOLDS))


def _number_of_classes(num_classes: int | None, bbox_head: dict | Sequence[dict], mask_head: dict | None) -> int:
    """What ``num_classes`` of the RoI head and of its heads agree on."""
    heads = {f'bbox_head.{i}': head for i, head in enumerate(bbox_head)} if _is_list(bbox_head) else {}
    heads = {**(heads or dict(bbox_head=bbox_head)), 'mask_head': mask_head or {}}
    given = {f'roi_head.{name}.num_classes': head.get('num_classes') for name, head in heads.items()}
    given = {name: count for name, count in {'roi_head.num_classes': num_classes, **given}.items() if count is not None}
    if not given:
        raise ValueError('roi_head.num_classes must be set: it reaches all heads')
    (first, count), *others = given.items()
    if type(count) is not int or count < 1:
        raise ValueError(f'{first} must be an int of at least 1, got {count!r}')
    for name, other in others:
        if other != count:
            raise ValueError(
                f'{name}={other!r} contradicts {first}={count}: set roi_head.num_classes alone, it reaches all heads'
            )
    return count


def _with_coder(head: dict, stage: int, its_own: bool) -> dict:
    """A copy of a box head with the box coder of a stage; one that was given for all stages is that of the first."""
    head = copy.deepcopy(head)
    given = head.get('bbox_coder') or {}
    coder = {**(FIRST_CODER if kind_of(given) in ('', FIRST_CODER['type']) else {}), **given}
    if 'target_stds' in coder and not (its_own and 'target_stds' in given):
        coder['target_stds'] = [std / (stage + 1) for std in coder['target_stds']]
    head['bbox_coder'] = coder
    return head


def _stage_cfgs(
    train_cfg: dict | Sequence[dict] | None, thresholds: Sequence[float] | None, count: int, resample: bool
) -> list[dict] | None:
    """Assigner and sampler of each stage."""
    if train_cfg is None:
        return None
    listed = not isinstance(train_cfg, dict)
    cfgs: list[dict] = [copy.deepcopy(cfg) for cfg in (train_cfg if listed else [train_cfg] * count)]
    for stage, cfg in enumerate(cfgs):
        key = f'roi_head.train_cfg.{stage}' if listed else 'roi_head.train_cfg'
        if stage and not resample:
            if listed and cfg.get('sampler') is not None:
                raise ValueError(f'{key}.sampler contradicts resample=False: leave it out, or set resample=True')
            cfg['sampler'] = dict(type='mmvim.AllBoxesSampler')
        for part in ('assigner', 'sampler'):
            if not isinstance(cfg.get(part), dict):
                raise ValueError(f'{key}.{part} must be a dict, got {cfg.get(part)!r}')
        if listed and thresholds is None:
            if kind_of(cfg['assigner']) == 'MaxIoUAssigner' and 'pos_iou_thr' not in cfg['assigner']:
                raise ValueError(f'{key}.assigner has no pos_iou_thr: set it, or roi_head.iou_thresholds')
            continue
        iou = (thresholds or IOU_THRESHOLDS)[stage]
        given = cfg['assigner'].get('pos_iou_thr', iou)
        if given != iou:
            raise ValueError(
                f'{key}.assigner.pos_iou_thr={given} contradicts the IoU {iou} of stage {stage}: set '
                'roi_head.iou_thresholds alone'
            )
        cfg['assigner'] = dict(pos_iou_thr=iou, neg_iou_thr=iou, min_pos_iou=iou) | cfg['assigner']
    return [ConfigDict(cfg) for cfg in cfgs]
