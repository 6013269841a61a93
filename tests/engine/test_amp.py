import pytest
import torch
from mmdet.registry import MODELS
from mmdet.structures import DetDataSample
from mmdet.structures.mask import BitmapMasks
from mmengine.registry import OPTIM_WRAPPERS, init_default_scope
from mmengine.structures import InstanceData
from torch import nn

from mmvim.engine.amp import low_precision


@pytest.fixture
def detector(load_config):
    init_default_scope('mmdet')
    torch.manual_seed(0)
    cfg = load_config('demo/cascade_mask_rcnn_vim_ti_shapes.py')
    cfg.model.backbone.arch.depth = 2
    model = MODELS.build(cfg.model)
    model.init_weights()
    return model


def batch(size=128, count=2):
    torch.manual_seed(1)
    samples = []
    for _ in range(count):
        sample = DetDataSample(
            metainfo=dict(
                img_shape=(size, size), ori_shape=(size, size), batch_input_shape=(size, size), pad_shape=(size, size)
            )
        )
        masks = torch.zeros(2, size, size, dtype=torch.uint8)
        masks[0, 10:50, 20:60] = masks[1, 70:100, 60:110] = 1
        sample.gt_instances = InstanceData(
            bboxes=torch.tensor([[20.0, 10, 60, 50], [60, 70, 110, 100]]),
            labels=torch.tensor([0, 3]),
            masks=BitmapMasks(masks.numpy(), size, size),
        )
        sample.ignored_instances = InstanceData(bboxes=torch.zeros(0, 4), labels=torch.zeros(0, dtype=torch.long))
        samples.append(sample)
    return torch.randn(count, 3, size, size), samples


def wrapper(model, **settings):
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-4)
    return OPTIM_WRAPPERS.build(dict(type='mmvim.AmpOptimWrapper', optimizer=optimizer, **settings))


@pytest.mark.parametrize('dtype', ['bfloat16', 'float16'])
def test_backbone_and_neck_are_low_precision_and_proposals_float32(detector, dtype, monkeypatch):
    low, seen = getattr(torch, dtype), {}
    detector.backbone.layers[0].mixer.in_proj.register_forward_hook(lambda m, i, o: seen.update(mixer=o.dtype))
    detector.neck.register_forward_pre_hook(lambda m, i: seen.update(neck_in={x.dtype for x in i[0]}))
    conv = next(module for module in detector.neck.modules() if isinstance(module, nn.Conv2d))
    conv.register_forward_hook(lambda m, i, o: seen.update(neck_conv=o.dtype))
    detector.neck.register_forward_hook(lambda m, i, o: seen.update(neck_out={x.dtype for x in o}))
    loss_and_predict = detector.rpn_head.loss_and_predict

    def spy(*args, **kwargs):
        losses, proposals = loss_and_predict(*args, **kwargs)
        seen.update(boxes=torch.cat([p.bboxes for p in proposals]), losses={x.dtype for x in losses['loss_rpn_bbox']})
        return losses, proposals

    monkeypatch.setattr(detector.rpn_head, 'loss_and_predict', spy)
    optim_wrapper = wrapper(detector, dtype=dtype)
    images, samples = batch()
    with optim_wrapper.optim_context(detector):
        loss, _ = detector.parse_losses(detector(images, samples, mode='loss'))
    before = detector.backbone.patch_embed.proj.weight.clone()
    optim_wrapper.update_params(loss)

    assert seen['mixer'] == low == seen['neck_conv']
    assert seen['neck_in'] == {torch.float32}, 'the residual stream is float32'
    assert seen['neck_out'] == {torch.float32} == seen['losses']
    assert seen['boxes'].dtype == torch.float32
    assert not torch.equal(seen['boxes'], seen['boxes'].to(low).float()), 'boxes lie on the grid of the low precision'
    assert torch.isfinite(loss)
    assert not torch.equal(before, detector.backbone.patch_embed.proj.weight)
    for name, parameter in detector.named_parameters():
        assert parameter.grad is None or torch.isfinite(parameter.grad).all(), name


@pytest.mark.parametrize('dtype', [torch.bfloat16, torch.float16])
def test_the_feature_maps_are_those_of_float32_up_to_rounding(detector, dtype):
    detector.eval()
    images, _ = batch()
    with torch.no_grad():
        exact = detector.extract_feat(images)
        with low_precision(detector, ('backbone', 'neck'), dtype):
            rounded = detector.extract_feat(images)
        again = detector.extract_feat(images)
    for a, b, c in zip(exact, rounded, again, strict=True):
        assert torch.equal(a, c), 'low precision ends with its context'
        error = ((a - b).norm() / a.norm()).item() / torch.finfo(dtype).eps
        assert 0.1 < error < 1, 'relative error, in units of the rounding of one number'


def test_the_context_ends_when_the_model_fails(detector):
    with pytest.raises(ZeroDivisionError), low_precision(detector, ('backbone', 'neck'), torch.bfloat16):
        assert 'forward' in vars(detector.neck)
        raise ZeroDivisionError
    assert 'forward' not in vars(detector.neck) and 'forward' not in vars(detector.backbone)


def test_a_forward_of_the_module_itself_is_used_and_stays(detector):
    """mmengine's activation checkpointing, for example, puts a forward on the module itself."""
    calls = []
    backbone_forward = detector.backbone.forward

    def wrapped(x):
        calls.append(torch.is_autocast_enabled('cpu'))
        return backbone_forward(x)

    detector.eval()
    detector.backbone.forward = wrapped
    images, _ = batch(64, 1)
    with torch.no_grad():
        with low_precision(detector, ('backbone', 'neck'), torch.bfloat16):
            detector.extract_feat(images)
        detector.extract_feat(images)
    assert vars(detector.backbone)['forward'] is wrapped and 'forward' not in vars(detector.neck)
    assert calls == [True, False]


def test_float16_scales_the_loss_and_bfloat16_does_not(detector):
    assert wrapper(detector, dtype='float16').loss_scaler.is_enabled()
    assert wrapper(detector, dtype='float16', loss_scale=8.0).loss_scaler.get_scale() == 8
    assert not wrapper(detector).loss_scaler.is_enabled()
    state = wrapper(detector, dtype='float16', loss_scale=8.0).state_dict()
    fresh = wrapper(detector, dtype='float16')
    fresh.load_state_dict(state)
    assert fresh.loss_scaler.get_scale() == 8


def test_wrong_settings_are_refused(detector):
    with pytest.raises(ValueError, match="dtype must be one of .*got 'float8'"):
        wrapper(detector, dtype='float8')
    with pytest.raises(ValueError, match='Linear has none of'), low_precision(nn.Linear(2, 2), ('body',), torch.half):
        pass
