import copy

import numpy as np
import pytest
import torch
from mmdet.registry import MODELS
from mmdet.structures import DetDataSample
from mmengine.registry import init_default_scope
from mmengine.structures import InstanceData

from mmvim.models.test_time_augs import InstanceTTAModel


@pytest.fixture
def model_cfg(load_config):
    init_default_scope('mmdet')
    cfg = load_config('demo/cascade_mask_rcnn_vim_ti_shapes.py').model
    cfg.backbone.arch.depth = 1
    return cfg


def test_one_number_sets_all_heads(model_cfg):
    model_cfg.roi_head.num_classes = 7
    head = MODELS.build(model_cfg).roi_head
    assert [h.num_classes for h in head.bbox_head] == [7, 7, 7]
    assert [h.fc_cls.out_features for h in head.bbox_head] == [8, 8, 8]
    assert [h.fc_reg.out_features for h in head.bbox_head] == [4, 4, 4]
    assert len(head.mask_head) == 1 and head.mask_head[0].conv_logits.out_channels == 7


def test_stages_get_stricter(model_cfg):
    head = MODELS.build(model_cfg).roi_head
    assert [a.pos_iou_thr for a in head.bbox_assigner] == [0.5, 0.6, 0.7]
    stds = [h.bbox_coder.stds for h in head.bbox_head]
    assert stds == [pytest.approx([s / k for s in (0.1, 0.1, 0.2, 0.2)]) for k in (1, 2, 3)]


def test_building_does_not_change_the_config(model_cfg):
    before = dict(model_cfg.roi_head.bbox_head)
    MODELS.build(model_cfg)
    assert model_cfg.roi_head.bbox_head == before


STAGE = dict(
    assigner=dict(type='MaxIoUAssigner', pos_iou_thr=0.4, neg_iou_thr=0.3, min_pos_iou=0.4),
    sampler=dict(type='RandomSampler', num=8, pos_fraction=0.5),
    mask_size=28,
    pos_weight=-1,
    debug=False,
)
LATER = {key: value for key, value in STAGE.items() if key != 'sampler'}
OPEN = dict(stage_loss_weights=None, resample=None)  # what the demo's config sets


@pytest.mark.parametrize(
    'roi_head, expected',
    [
        (dict(num_classes=0), r'roi_head\.num_classes must be an int of at least 1'),
        (dict(num_classes=None), r'roi_head\.num_classes must be set'),
        (dict(num_classes=2.0), r'roi_head\.num_classes must be an int'),
        (
            dict(bbox_head=dict(num_classes=3)),
            r'bbox_head\.num_classes=3 contradicts roi_head\.num_classes=4',
        ),
        (
            dict(mask_head=dict(num_classes=3)),
            r'roi_head\.mask_head\.num_classes=3 contradicts .* set roi_head\.num',
        ),
        (dict(mask_head=3), r'roi_head\.mask_head must be one dict'),
        (dict(mask_head=[dict(type='FCNMaskHead')] * 3), r"mask_head must be one dict.*MMDetection's own"),
        (dict(mask_roi_extractor=[dict()]), r'roi_head\.mask_roi_extractor must be one dict'),
        (dict(bbox_head=3), r'roi_head\.bbox_head must be a dict, or a list'),
        (dict(bbox_roi_extractor=None), r'roi_head\.bbox_roi_extractor must be a dict, or a list'),
        (dict(shared_head=dict(type='ResLayer')), r'roi_head\.shared_head is not supported'),
        (dict(iou_thresholds=(0.5,)), r'iou_thresholds has 1, stage_loss_weights has 3'),
        (dict(iou_thresholds=0.5), r'roi_head\.iou_thresholds must be one number per stage'),
        (dict(iou_thresholds=(0.5, 0.6, 1.0)), r'roi_head\.iou_thresholds must be one number in \(0, 1\) per stage'),
        (dict(stage_loss_weights=(1, 1, -1)), r'roi_head\.stage_loss_weights must be one number of at least 0'),
        (dict(num_stages=2), r'num_stages is 2, stage_loss_weights has 3'),
        (dict(num_stages=2, stage_loss_weights=(1, 1)), r'2 stages need roi_head\.iou_thresholds'),
        (dict(num_stages='3'), r'num_stages must be a whole number'),
        (dict(scale_gradient='no'), r'scale_gradient must be True or False'),
        (dict(resample='no'), r'resample must be True or False'),
    ],
)
def test_what_cannot_be_taken_is_refused_by_name(model_cfg, roi_head, expected):
    _merge(model_cfg.roi_head, roi_head)
    with pytest.raises(ValueError, match=expected):
        MODELS.build(model_cfg)


@pytest.mark.parametrize(
    'roi_head, rcnn, expected',
    [
        (OPEN, dict(sampler=STAGE['sampler']), r'roi_head\.train_cfg\.assigner must be a dict'),
        (OPEN, STAGE, r'train_cfg\.assigner\.pos_iou_thr=0\.4 contradicts the IoU 0\.5 of stage 0: .*iou_thresholds'),
        (OPEN, [STAGE] * 2 + [LATER], r'roi_head\.train_cfg\.2\.sampler must be a dict'),
        (dict(OPEN, num_stages=3), [STAGE] * 2, r'num_stages is 3, train_cfg has 2'),
        (dict(OPEN, iou_thresholds=(0.4, 0.6)), [STAGE] * 2, r'train_cfg\.1\.assigner\.pos_iou_thr=0\.4 contradicts'),
        (dict(OPEN, resample=False), [STAGE] * 2, r'train_cfg\.1\.sampler contradicts resample=False'),
        (OPEN, [dict(STAGE, assigner=dict(type='MaxIoUAssigner'))] * 3, r'train_cfg\.0\.assigner has no pos_iou_thr'),
    ],
)
def test_what_contradicts_the_training_of_stages_is_refused(model_cfg, roi_head, rcnn, expected):
    model_cfg.roi_head.update(roi_head)
    model_cfg.train_cfg.rcnn = rcnn
    with pytest.raises(ValueError, match=expected):
        MODELS.build(model_cfg)


def _merge(part, changes):
    for key, value in changes.items():
        if isinstance(value, dict) and isinstance(part.get(key), dict):
            part[key].update(value)
        else:
            part[key] = value


def test_what_mmdetection_takes_is_taken(model_cfg):
    roi_head = model_cfg.roi_head
    del roi_head['num_classes']
    roi_head.update(OPEN, num_stages=2)
    roi_head.mask_head.num_classes = 3
    coder = dict(type='DeltaXYWHBBoxCoder', target_means=[0.0] * 4, target_stds=[0.3, 0.3, 0.4, 0.4], clip_border=False)
    roi_head.bbox_head = [dict(roi_head.bbox_head, bbox_coder=coder), dict(roi_head.bbox_head, conv_out_channels=16)]
    roi_head.mask_roi_extractor = None
    model_cfg.train_cfg.rcnn = [STAGE, dict(STAGE, sampler=dict(type='RandomSampler', num=6, pos_fraction=0.5))]
    head = MODELS.build(model_cfg).roi_head
    assert [h.num_classes for h in (*head.bbox_head, *head.mask_head)] == [3, 3, 3]
    assert [h.bbox_coder.stds for h in head.bbox_head] == [
        [0.3, 0.3, 0.4, 0.4],
        pytest.approx([0.05, 0.05, 0.1, 0.1]),
    ]
    assert [h.bbox_coder.clip_border for h in head.bbox_head] == [False, True]
    assert [h.conv_out_channels for h in head.bbox_head] == [32, 16]
    assert [s.num for s in head.bbox_sampler] == [8, 6]
    assert [(a.pos_iou_thr, a.neg_iou_thr) for a in head.bbox_assigner] == [(0.4, 0.3)] * 2
    assert head.mask_roi_extractor[0] is head.bbox_roi_extractor[0]


def test_a_box_coder_of_all_stages_is_that_of_the_first(model_cfg):
    model_cfg.roi_head.bbox_head.bbox_coder = dict(target_stds=[0.6] * 4)
    model_cfg.train_cfg.rcnn.assigner.neg_iou_thr = 0.4
    head = MODELS.build(model_cfg).roi_head
    assert [h.bbox_coder.stds for h in head.bbox_head] == [pytest.approx([0.6 / k] * 4) for k in (1, 2, 3)]
    assert [(a.pos_iou_thr, a.neg_iou_thr) for a in head.bbox_assigner] == [(0.5, 0.4), (0.6, 0.4), (0.7, 0.4)]


@pytest.mark.parametrize('scope', ['', 'mmdet.'])
def test_a_box_coder_without_spread_has_the_usual_one(model_cfg, scope):
    model_cfg.roi_head.bbox_head.bbox_coder = dict(type=f'{scope}DeltaXYWHBBoxCoder', clip_border=False)
    head = MODELS.build(model_cfg).roi_head
    assert [h.bbox_coder.stds[0] for h in head.bbox_head] == [pytest.approx(0.1 / k) for k in (1, 2, 3)]
    assert not any(h.bbox_coder.clip_border for h in head.bbox_head)


def samples(count, size=128):
    meta = dict(
        img_shape=(size, size),
        ori_shape=(size, size),
        batch_input_shape=(size, size),
        pad_shape=(size, size),
        scale_factor=(1.0, 1.0),
    )
    result = []
    for _ in range(count):
        sample = DetDataSample(metainfo=meta)
        sample.gt_instances = InstanceData(bboxes=torch.zeros(0, 4), labels=torch.zeros(0, dtype=torch.long))
        sample.ignored_instances = InstanceData(bboxes=torch.zeros(0, 4), labels=torch.zeros(0, dtype=torch.long))
        result.append(sample)
    return result


RELEASED = dict(stage_loss_weights=(1, 1, 1), scale_gradient=True, resample=False)


def with_objects(count):
    """Samples with two objects each, and proposals around them and elsewhere, one of which has no area."""
    from mmdet.structures.mask import BitmapMasks

    torch.manual_seed(1)
    batch, proposals = samples(count), []
    for sample in batch:
        boxes = torch.tensor([[10.0, 20, 60, 70], [70, 40, 120, 110]])
        masks = np.zeros((2, 128, 128), np.uint8)
        masks[0, 20:70, 10:60] = masks[1, 40:110, 70:120] = 1
        sample.gt_instances = InstanceData(
            bboxes=boxes, labels=torch.tensor([1, 3]), masks=BitmapMasks(masks, 128, 128)
        )
        corners = torch.rand(30, 2) * 90
        near = boxes.repeat(8, 1) + torch.randn(16, 4) * 4
        proposals.append(InstanceData(bboxes=torch.cat((near, torch.cat((corners, corners + 30), 1)))))
    return batch, proposals


def feature_gradients(model_cfg, with_mask, **settings):
    """Gradients of the RoI head's loss: into the features, and into the parameters by name."""
    model_cfg = copy.deepcopy(model_cfg)
    model_cfg.roi_head.update(settings)
    if not with_mask:
        model_cfg.roi_head.mask_head = None
    torch.manual_seed(0)
    model = MODELS.build(model_cfg)
    head = model.roi_head
    generator = torch.Generator().manual_seed(2)
    for parameter in head.parameters():
        with torch.no_grad():
            parameter.copy_(torch.randn(parameter.shape, generator=generator) * 0.05)
    batch, proposals = with_objects(2)
    torch.manual_seed(3)
    features = [torch.randn(2, 64, side, side, requires_grad=True) for side in (16, 8, 4)]
    losses = head.loss(features, proposals, batch)
    model.parse_losses(losses)[0].backward()
    into_features = torch.cat([feature.grad.flatten() for feature in features[:2]])
    return into_features, {name: parameter.grad for name, parameter in head.named_parameters()}


def test_stages_send_a_share_of_their_gradient_into_the_features(model_cfg):
    weights = dict(stage_loss_weights=(1, 1, 1), resample=False)
    whole, of_heads = feature_gradients(model_cfg, False, **weights, scale_gradient=False)
    share, same = feature_gradients(model_cfg, False, **weights, scale_gradient=True)
    assert whole.abs().max() > 0
    torch.testing.assert_close(share, whole / 3, rtol=1e-4, atol=1e-7)
    assert of_heads and of_heads.keys() == same.keys()
    for name in of_heads:
        torch.testing.assert_close(same[name], of_heads[name], msg=name)
    # the mask head's gradient is not divided
    both, _ = feature_gradients(model_cfg, True, **weights, scale_gradient=False)
    mixed, _ = feature_gradients(model_cfg, True, **weights, scale_gradient=True)
    torch.testing.assert_close(mixed - share, both - whole, rtol=1e-3, atol=1e-6)
    assert (both - whole).abs().max() > 0


def test_the_coco_configs_train_their_cascade_as_released(load_config):
    init_default_scope('mmdet')
    for name in ('vim/cascade_mask_rcnn_vim_ti_coco.py', 'deit/cascade_mask_rcnn_deit_ti_coco.py'):
        cfg = load_config(name).model
        cfg.backbone.arch = (
            dict(embed_dims=16, depth=4, num_heads=2) if 'deit' in name else dict(embed_dims=16, depth=1)
        )
        if 'deit' in name:
            cfg.backbone.global_attn_indexes = (3,)
        cfg.neck.in_channels = 16
        head = MODELS.build(cfg).roi_head
        assert tuple(head.stage_loss_weights) == (1, 1, 1) and head.scale_gradient
        assert [type(s).__name__ for s in head.bbox_sampler] == ['RandomSampler', 'AllBoxesSampler', 'AllBoxesSampler']
        assert head.bbox_sampler[0].num == 512


def boxes_of_stages(model_cfg, **settings):
    """RoIs (n, 5) that every stage sees, and the refined boxes (n, 5) that it gives, without those that have no area"""
    model_cfg.roi_head.update(settings)
    head = MODELS.build(model_cfg).roi_head
    torch.manual_seed(0)
    for box_head in head.bbox_head:
        torch.nn.init.normal_(box_head.fc_reg.weight, std=0.05)
        box_head.fc_reg.bias.data[3] = -1.0  # smaller boxes, so that no refined one is like another
    seen, deltas = [], []
    for extractor, box_head in zip(head.bbox_roi_extractor, head.bbox_head, strict=True):
        extractor.register_forward_hook(lambda _, inputs, __: seen.append(inputs[1]))
        box_head.register_forward_hook(lambda _, __, outputs: deltas.append(outputs[1].detach()))
    batch, proposals = with_objects(2)
    head.loss([torch.randn(2, 64, s, s) for s in (16, 8, 4)], proposals, batch)
    refined = []
    for rois, delta, box_head in zip(seen, deltas, head.bbox_head, strict=True):
        boxes = box_head.bbox_coder.decode(rois[:, 1:], delta, max_shape=(128, 128))
        kept = (boxes[:, 2] > boxes[:, 0]) & (boxes[:, 3] > boxes[:, 1])
        refined.append(torch.cat((rois[:, :1], boxes), 1)[kept])
    return seen, refined


def in_order(boxes):
    return boxes[np.lexsort(boxes.numpy().T[::-1])]


def test_later_stages_take_all_refined_boxes_and_no_new_ground_truth(model_cfg):
    truth = with_objects(1)[0][0].gt_instances.bboxes
    model_cfg.train_cfg.rcnn.sampler.num = 20
    model_cfg.train_cfg.rcnn.sampler.pos_fraction = 0.8
    seen, refined = boxes_of_stages(model_cfg, **RELEASED)
    assert len(seen[0]) == 40 and any((seen[0][:, 1:] == box).all(1).any() for box in truth)
    for stage in (1, 2):
        torch.testing.assert_close(in_order(seen[stage]), in_order(refined[stage - 1]), rtol=0, atol=0)
        assert len(seen[stage]) >= 30

    seen, refined = boxes_of_stages(model_cfg, resample=True)
    assert all((seen[stage][:, 1:] == box).all(1).any() for stage in (1, 2) for box in truth)  # put in again
    assert len(seen[1]) <= 40 - 4 + 4


def test_boxes_without_area_are_left_out(model_cfg):
    from mmdet.models.task_modules import MaxIoUAssigner

    from mmvim.models.heads.cascade_roi_head import AllBoxesSampler

    boxes = torch.tensor([[0.0, 0, 10, 10], [5, 5, 5, 9], [40, 40, 50, 50], [7, 9, 9, 8]])
    truth = InstanceData(bboxes=torch.tensor([[0.0, 0, 10, 9]]), labels=torch.tensor([2]))
    found = InstanceData(priors=boxes)
    assigned = MaxIoUAssigner(0.5, 0.5, 0.5).assign(found, truth)
    result = AllBoxesSampler().sample(assigned, found, truth, feats=None)
    assert torch.equal(result.pos_priors, boxes[:1]) and torch.equal(result.neg_priors, boxes[2:3])
    assert result.pos_gt_labels.tolist() == [2]


@pytest.mark.parametrize('settings', [{}, RELEASED])
def test_images_without_objects_train(model_cfg, settings):
    from mmdet.structures.mask import BitmapMasks

    model_cfg.roi_head.update(settings)
    model = MODELS.build(model_cfg)
    batch = samples(2)
    for sample in batch:
        sample.gt_instances.masks = BitmapMasks([], 128, 128)
    losses = model(torch.randn(2, 3, 128, 128), batch, mode='loss')
    assert set(losses) >= {'s0.loss_mask', 's2.loss_cls'} and 's1.loss_mask' not in losses
    total, _ = model.parse_losses(losses)
    total.backward()
    assert torch.isfinite(total)


def test_each_box_gets_one_mask_and_none_is_fine(model_cfg):
    model = MODELS.build(model_cfg).eval()
    with torch.no_grad():
        model_cfg.test_cfg.rcnn.score_thr = 0.0
        some = MODELS.build(model_cfg).eval().predict(torch.randn(1, 3, 128, 128), samples(1))[0].pred_instances
        model.test_cfg.rcnn.score_thr = model.roi_head.test_cfg.score_thr = 1.1
        none = model.predict(torch.randn(1, 3, 128, 128), samples(1))[0].pred_instances
    assert some.masks.shape == (len(some.bboxes), 128, 128) and len(some.bboxes) == 100
    assert none.masks.shape == (0, 128, 128)


def test_raw_outputs_have_one_mask_per_proposal(model_cfg):
    model = MODELS.build(model_cfg).eval()
    with torch.no_grad():
        ((scores, deltas, masks),) = model(torch.randn(1, 3, 128, 128), samples(1), mode='tensor')
    assert len(scores[0]) == len(masks[0])
    assert masks[0].shape[1:] == (4, 28, 28)


@pytest.mark.parametrize('direction, dims', [('horizontal', (-1,)), ('vertical', (-2,)), ('diagonal', (-2, -1))])
def test_flipped_views_are_merged(direction, dims):
    mask = torch.zeros(1, 20, 30, dtype=torch.bool)
    mask[0, 2:8, 3:12] = True
    box = torch.tensor([[3.0, 2, 12, 8]])

    def view(flip, score, masks):
        rows, columns = torch.nonzero(masks[0], as_tuple=True)
        boxes = torch.stack((columns.min(), rows.min(), columns.max() + 1, rows.max() + 1)).float()[None]
        sample = DetDataSample(metainfo=dict(ori_shape=(20, 30), flip=flip, flip_direction=direction if flip else None))
        sample.pred_instances = InstanceData(
            bboxes=boxes, scores=torch.tensor([score]), labels=torch.tensor([1]), masks=masks
        )
        return sample

    from mmengine.config import ConfigDict

    model = InstanceTTAModel.__new__(InstanceTTAModel)
    torch.nn.Module.__init__(model)
    model.tta_cfg = ConfigDict(nms=dict(type='nms', iou_threshold=0.5), max_per_img=100)
    other = torch.zeros_like(mask)
    other[0, 15:19, 20:25] = True
    views = [view(False, 0.5, mask), view(True, 0.9, mask.flip(dims)), view(True, 0.3, other.flip(dims))]
    merged = model._merge_single_sample(views).pred_instances
    assert merged.scores.tolist() == pytest.approx([0.9, 0.3])
    assert torch.equal(merged.bboxes[:1], box)
    assert torch.equal(merged.masks, torch.cat((mask, other)))
