"""The configs of Vim and of its DeiT baseline state their recipes, and evaluate published files."""

import pytest
import torch
from config_runs import NAMES as ALL
from config_runs import check_published_classifier, rates, train_and_predict
from mmengine.registry import MODELS

from mmvim.models import VisionMamba, VisionTransformer

NAMES = [name for name in ALL if name.startswith(('vim/', 'deit/'))]
ADE20K = '{0}/upernet_{0}-{1}_{2}_ade20k-512x512.py'
WIDTH = dict(ti=192, s=384, b=768)
ARCH = dict(vim=dict(ti='tiny', s='small', b='base'), deit=dict(ti='deit-tiny', s='deit-small', b='deit-base'))


def test_all_that_was_promised_is_there():
    promised = [f'vim/{kind}_rcnn_vim_{size}_coco.py' for kind in ('mask', 'cascade_mask') for size in ('ti', 's', 'b')]
    promised += [f'deit/{kind}_rcnn_deit_{size}_coco.py' for kind in ('mask', 'cascade_mask') for size in ('ti', 's')]
    for schedule in ('8xb2-160k', '8xb4-60k'):
        promised += [ADE20K.format('vim', size, schedule) for size in ('ti', 's', 'b')]
        promised += [ADE20K.format('deit', size, schedule) for size in ('ti', 's')]
    promised += [f'{family}/{family}-{size}_8xb128_in1k.py' for family in ('vim', 'deit') for size in ('ti', 's', 'b')]
    promised += [f'vim/vim-{size}-stride8_8xb128-30e_in1k.py' for size in ('ti', 's', 'b')]
    promised += [f'{family}/upernet_{family}-ti_camvid-240x180.py' for family in ('vim', 'deit')]
    promised += ['vim/cascade_mask_rcnn_vim_ti_folder.py', 'vim/upernet_vim-ti_folder.py', 'vim/vim-ti_folder.py']
    assert set(promised) <= set(NAMES)


@pytest.mark.slow  # run by `pytest -m slow`
@pytest.mark.parametrize(
    ('name', 'size'),
    [
        ('vim/mask_rcnn_vim_ti_coco.py', (1024, 1024)),
        ('vim/upernet_vim-ti_8xb4-60k_ade20k-512x512.py', (512, 512)),
        ('vim/vim-ti-stride8_8xb128-30e_in1k.py', (224, 224)),
        ('deit/cascade_mask_rcnn_deit_ti_coco.py', (1024, 1024)),
        ('deit/upernet_deit-ti_8xb2-160k_ade20k-512x512.py', (512, 512)),
    ],
)
def test_one_training_step_and_one_prediction_at_full_size(load, name, size):
    torch.manual_seed(0)
    cfg = load(name)
    model = MODELS.build(cfg.model)
    model.backbone.init_weights()  # a class token of zeros would stay zero
    stayed = train_and_predict(cfg, model, [size] * (1 if cfg.default_scope == 'mmdet' else 2))
    assert not [key for key in stayed if key.startswith('backbone')]


# ---- recipes


@pytest.mark.parametrize('kind', ['mask', 'cascade_mask'])
def test_rates_of_vim_b_fall_faster(load, kind):
    found = rates(load(f'vim/{kind}_rcnn_vim_b_coco.py'))
    assert found['backbone.layers.23.mixer.in_proj.weight'] == pytest.approx((1e-4 * 0.7, 0.1))
    assert found['backbone.pos_embed'] == pytest.approx((1e-4 * 0.7**25, 0))


@pytest.mark.parametrize('kind', ['mask', 'cascade_mask'])
def test_deit_detects_by_the_recipe_of_vim_with_windows(load, kind):
    vim, deit = load(f'vim/{kind}_rcnn_vim_ti_coco.py'), load(f'deit/{kind}_rcnn_deit_ti_coco.py')
    backbone = MODELS.build(deit.model.backbone)
    assert [block.window_size for block in backbone.blocks] == [14, 14, 0] * 4
    assert backbone.grid == (64, 64) and not backbone.with_cls_token and not backbone.final_norm
    assert backbone.blocks[0].attn.attention == 'sdpa'
    found, wanted = rates(deit), rates(vim)
    assert found['backbone.blocks.11.mlp.fc1.weight'] == pytest.approx((1e-4 * 0.7, 0.1))
    assert found['backbone.blocks.0.norm1.weight'] == pytest.approx((1e-4 * 0.7**12, 0))
    assert found['backbone.blocks.0.mlp.fc1.bias'] == pytest.approx((1e-4 * 0.7**12, 0.1))
    assert found['backbone.pos_embed'] == pytest.approx((1e-4 * 0.7**13, 0))
    # over all blocks the rates fall alike
    assert found['backbone.pos_embed'][0] == pytest.approx(wanted['backbone.pos_embed'][0], rel=0.2)
    deit.pop('vitdet')  # the backbone's settings by name
    assert deit.optim_wrapper.paramwise_cfg.pop('custom_keys') == deit.pop('vitdet_decay').custom_keys
    for cfg in (vim, deit):
        cfg.model.pop('backbone')
        cfg.optim_wrapper.paramwise_cfg.pop('decay_rate')
    assert deit.to_dict() == vim.to_dict()


@pytest.mark.parametrize('size', ['ti', 's', 'b'])
def test_mask_rcnn_and_the_cascade_differ_in_the_second_stage_alone(load, size):
    single, cascade = load(f'vim/mask_rcnn_vim_{size}_coco.py'), load(f'vim/cascade_mask_rcnn_vim_{size}_coco.py')
    with torch.device('meta'):
        model = MODELS.build(single.model)
    assert len(model.roi_head.bbox_head.shared_convs) == 4 and len(model.roi_head.bbox_head.shared_fcs) == 1
    assert model.roi_head.bbox_head.fc_reg.out_features == 4 * 80  # boxes of each class, as in detectron2's ViTDet
    assert model.roi_head.mask_head.num_classes == 80
    rcnn = single.model.train_cfg.rcnn
    assert {rcnn.assigner.pop(key) for key in ('pos_iou_thr', 'neg_iou_thr', 'min_pos_iou')} == {0.5}
    for cfg in (single, cascade):
        cfg.model.pop('type')
        cfg.model.pop('roi_head')
    assert single.to_dict() == cascade.to_dict()


@pytest.mark.parametrize('family', ['vim', 'deit'])
@pytest.mark.parametrize('size', ['ti', 's', 'b'])
def test_the_setting_of_the_paper_on_ade20k(load, family, size):
    if ADE20K.format(family, size, '8xb2-160k') not in NAMES:
        assert (family, size) == ('deit', 'b')
        return
    cfg = load(ADE20K.format(family, size, '8xb2-160k'))
    width = WIDTH[size]
    model = cfg.model
    assert model.backbone.arch == ARCH[family][size] and model.test_cfg.mode == 'whole'
    assert (model.decode_head.channels, model.auxiliary_head.channels) == (width, 256)
    assert model.decode_head.num_classes == model.auxiliary_head.num_classes == 150
    assert cfg.train_cfg.max_iters == 160000 and 8 * cfg.train_dataloader.batch_size == 16
    assert cfg.auto_scale_lr.base_batch_size == 16
    assert {lr for lr, _ in rates(cfg).values()} == {6e-5} and {decay for _, decay in rates(cfg).values()} == {0, 0.01}
    warmup, decay = cfg.param_scheduler
    assert (warmup.end, decay.begin, decay.end, decay.power, decay.get('eta_min', 0)) == (1500, 1500, 160000, 1.0, 0)
    pipeline = cfg.train_dataloader.dataset.pipeline
    assert pipeline[2].ratio_range == (0.5, 2.0) and pipeline[3].crop_size == (512, 512)
    assert [step.type for step in pipeline[4:6]] == ['RandomFlip', 'PhotoMetricDistortion']
    assert min(cfg.test_dataloader.dataset.pipeline[1].scale) == 512


# size: learning rate, weight decay, layer decay over 24 blocks
RELEASED = dict(ti=(2e-4, 0.1, 0.92), s=(1e-4, 0.05, 0.95), b=(1e-4, 0.05, 0.95))


@pytest.mark.parametrize('size', RELEASED)
def test_the_released_recipe_on_ade20k(load, size):
    lr, weight_decay, layer_decay = RELEASED[size]
    cfg = load(ADE20K.format('vim', size, '8xb4-60k'))
    assert cfg.model.test_cfg == dict(mode='slide', crop_size=(512, 512), stride=(341, 341))
    backbone = cfg.model.backbone
    assert (backbone.out_indices, backbone.cls_token, backbone.img_size) == ((5, 11, 17, 23), None, 512)
    feature = (backbone.get('feature_source'), backbone.get('rotary'))
    assert feature == ((None, None) if size == 'ti' else ('residual', 'both'))
    assert cfg.train_cfg.max_iters == 60000 and 8 * cfg.train_dataloader.batch_size == 32
    assert cfg.auto_scale_lr.base_batch_size == 32
    warmup, decay = cfg.param_scheduler
    assert (warmup.end, decay.begin, decay.end) == (1500, 1500, 60000)
    found = rates(cfg)
    assert found['decode_head.conv_seg.weight'] == pytest.approx((lr, weight_decay))
    assert {rate for name, (rate, _) in found.items() if 'layers.' in name} == {lr}
    assert found['backbone.pos_embed'] == pytest.approx((lr * layer_decay**25, weight_decay))
    cfg.optim_wrapper.paramwise_cfg.decay_scope = 'all'
    meant = rates(cfg)
    assert meant['backbone.layers.23.mixer.in_proj.weight'][0] == pytest.approx(lr * layer_decay)
    assert meant['backbone.layers.0.mixer.in_proj.weight'][0] == pytest.approx(lr * layer_decay**24)
    if size == 'b':
        return
    deit = load(ADE20K.format('deit', size, '8xb4-60k'))
    assert rates(deit)['backbone.blocks.0.mlp.fc1.weight'][0] == pytest.approx(lr * layer_decay**24)
    for other in (cfg, deit):
        other.model.pop('backbone')
        other.optim_wrapper.paramwise_cfg.pop('decay_rate')
    assert deit.to_dict() == cfg.to_dict()


# weight decay, drop path
IN1K = {'vim-ti': (0.1, 0), 'vim-s': (0.05, 0.05), 'vim-b': (0.05, 0.1)}
IN1K.update({f'deit-{size}': (0.05, 0.1) for size in ('ti', 's', 'b')})


@pytest.mark.parametrize('name', IN1K)
def test_the_recipe_on_imagenet(load, name):
    family, _, size = name.partition('-')
    cfg = load(f'{family}/{name}_8xb128_in1k.py')
    backbone = cfg.model.backbone
    assert (backbone.arch, backbone.get('drop_path_rate', 0)) == (ARCH[family][size], IN1K[name][1])
    found = rates(cfg)
    assert found['head.fc.weight'] == pytest.approx((1e-3, IN1K[name][0]))
    assert found['backbone.pos_embed'] == found['backbone.cls_token'] == pytest.approx((1e-3, 0))
    assert cfg.auto_scale_lr.base_batch_size == 1024 == 8 * cfg.train_dataloader.batch_size
    warmup, cosine = cfg.param_scheduler
    assert cfg.train_cfg.max_epochs == cosine.end == 300 and warmup.end == cosine.begin == 5 == 300 - cosine.T_max
    assert cfg.model.head.loss.label_smooth_val == 0.1
    assert [(a.type, a.alpha) for a in cfg.model.train_cfg.augments] == [('Mixup', 0.8), ('CutMix', 1.0)]
    pipeline = {step.type: step for step in cfg.train_dataloader.dataset.pipeline}
    assert pipeline['RandomErasing'].erase_prob == 0.25 and pipeline['RandomResizedCrop'].scale == 224
    assert cfg.custom_hooks[0].type == 'EMAHook'


@pytest.mark.parametrize('size', ['ti', 's', 'b'])
def test_long_sequence_fine_tuning(load, size):
    cfg = load(f'vim/vim-{size}-stride8_8xb128-30e_in1k.py')
    with torch.device('meta'):
        backbone = MODELS.build(cfg.model.backbone)
    assert (
        backbone.grid == (27, 27)
        and cfg.model.backbone.arch == ARCH['vim'][size]
        and backbone.patch_embed.proj.kernel_size == (16, 16)
    )
    assert cfg.train_cfg.max_epochs == 30 and not cfg.param_scheduler
    assert rates(cfg)['head.fc.weight'] == pytest.approx((1e-5, 1e-8))


# ---- published files

SMALL = {
    VisionMamba: dict(embed_dims=32, depth=4, d_state=4),
    VisionTransformer: dict(embed_dims=32, depth=4, num_heads=2),
}


@pytest.mark.parametrize(
    ('name', 'kind'),
    [('vim/vim-ti_8xb128_in1k.py', VisionMamba), ('deit/deit-ti_8xb128_in1k.py', VisionTransformer)],
)
def test_a_published_classifier_evaluates_as_downloaded(tmp_path, monkeypatch, name, kind):
    monkeypatch.chdir(tmp_path)
    check_published_classifier(
        tmp_path,
        name,
        kind(SMALL[kind], img_size=64),
        dict(arch=dict(_delete_=True, **SMALL[kind]), img_size=(64, 48)),
        lambda weights, path: torch.save({'model': weights, 'epoch': 299}, path),
    )
