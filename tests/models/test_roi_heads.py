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


@pytest.mark.parametrize('wrong', [dict(num_classes=0), dict(num_classes=None), dict(iou_thresholds=(0.5,))])
def test_wrong_numbers_are_refused(model_cfg, wrong):
    model_cfg.roi_head.update(wrong)
    with pytest.raises(ValueError, match='num_classes must be|one number per stage'):
        MODELS.build(model_cfg)


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


def test_images_without_objects_train(model_cfg):
    from mmdet.structures.mask import BitmapMasks

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
