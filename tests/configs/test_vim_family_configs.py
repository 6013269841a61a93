"""Every config of Vim and of its DeiT baseline builds, trains and predicts at a reduced size, and states its recipe."""

import copy
import pickle
from importlib import import_module
from pathlib import Path

import cv2
import numpy as np
import pytest
import torch
import yaml
from mmengine.optim import build_optim_wrapper
from mmengine.registry import MODELS, init_default_scope
from mmengine.structures import InstanceData, PixelData
from torch import nn

from mmvim import cli
from mmvim.models import VisionMamba, VisionTransformer

CONFIGS = Path(__file__).parents[2] / 'configs'
NAMES = sorted(str(path.relative_to(CONFIGS)) for family in ('vim', 'deit') for path in (CONFIGS / family).glob('*.py'))
ADE20K = '{0}/upernet_{0}-{1}_{2}_ade20k-512x512.py'
WIDTH = dict(ti=192, s=384, b=768)
ARCH = dict(vim=dict(ti='tiny', s='small', b='base'), deit=dict(ti='deit-tiny', s='deit-small', b='deit-base'))
SMALL = dict(vim=dict(embed_dims=32, depth=4, d_state=4), deit=dict(embed_dims=32, depth=4, num_heads=2))

LOADED = {}  # reading a config takes longer than most tests of it


@pytest.fixture
def load(load_config, tmp_path):
    (tmp_path / 'a.json').write_text('{"images": [], "annotations": [], "categories": [{"id": 1, "name": "a"}]}')

    def read(name):
        if 'folder' in name:
            cfg = load_config(name, data_root=str(tmp_path), train_ann='a.json', val_ann='a.json')
        else:
            cfg = copy.deepcopy(LOADED.get(name) or LOADED.setdefault(name, load_config(name)))
        init_default_scope(cfg.default_scope)
        import_module(f'{cfg.default_scope}.models')  # not first under torch.device('meta')
        return cfg

    return read


def rates(cfg):
    """Learning rate and weight decay of every parameter, by name."""
    with torch.device('meta'):
        model = MODELS.build(cfg.model)
    groups = build_optim_wrapper(model, cfg.optim_wrapper).optimizer.param_groups
    names = {id(parameter): name for name, parameter in model.named_parameters()}
    return {names[id(p)]: (g['lr'], g['weight_decay']) for g in groups for p in g['params']}


def test_all_that_was_promised_is_there():
    promised = [f'vim/{kind}_rcnn_vim_{size}_coco.py' for kind in ('mask', 'cascade_mask') for size in ('ti', 's', 'b')]
    promised += [f'deit/{kind}_rcnn_deit_{size}_coco.py' for kind in ('mask', 'cascade_mask') for size in ('ti', 's')]
    for schedule in ('8xb2-160k', '8xb4-60k'):
        promised += [ADE20K.format('vim', size, schedule) for size in ('ti', 's', 'b')]
        promised += [ADE20K.format('deit', size, schedule) for size in ('ti', 's')]
    promised += [f'{family}/{family}-{size}_8xb128_in1k.py' for family in ('vim', 'deit') for size in ('ti', 's', 'b')]
    promised += [f'vim/vim-{size}-stride8_8xb128-30e_in1k.py' for size in ('ti', 's')]
    promised += ['vim/upernet_vim-ti_camvid-240x180.py', 'deit/upernet_deit-ti_camvid-240x180.py']
    assert set(promised) <= set(NAMES)


@pytest.mark.parametrize('family', ['vim', 'deit'])
def test_the_metafile_lists_every_config(family):
    listed = yaml.safe_load((CONFIGS / family / 'metafile.yml').read_text())['Models']
    names = [f'configs/{name}' for name in NAMES if name.startswith(f'{family}/')]
    names = [name for name in names if 'folder' not in name and 'camvid' not in name]  # examples for data of one's own
    assert sorted(model['Config'] for model in listed) == names
    assert all(model['Config'] == f'configs/{family}/{model["Name"]}.py' for model in listed)
    index = yaml.safe_load((CONFIGS.parent / 'model-index.yml').read_text())['Import']
    assert f'configs/{family}/metafile.yml' in index


@pytest.mark.parametrize('name', NAMES)
def test_full_size_models_build_and_all_parts_fit(load, name):
    cfg = load(name)
    with torch.device('meta'):
        model = MODELS.build(cfg.model)
    assert isinstance(model.backbone, VisionMamba if name.startswith('vim/') else VisionTransformer)
    channels = model.backbone.out_channels
    if cfg.default_scope == 'mmdet':
        assert channels == (cfg.model.neck.in_channels,)
        assert model.backbone.out_strides == (16,)
        assert [stride for stride, _ in model.rpn_head.prior_generator.strides] == [4, 8, 16, 32, 64]
    elif cfg.default_scope == 'mmseg':
        assert list(channels) == [cfg.model.neck.embed_dim] * 4 == cfg.model.decode_head.in_channels
        assert cfg.model.auxiliary_head.in_channels == channels[0]
    else:
        assert channels == (cfg.model.head.in_channels,)
    groups = build_optim_wrapper(model, cfg.optim_wrapper).optimizer.param_groups
    assert sum(len(group['params']) for group in groups) == sum(p.requires_grad for p in model.parameters())


def reduced(cfg, family, size):
    """The config with a small backbone and small heads."""
    model = copy.deepcopy(cfg.model)
    width = 32
    model.backbone.update(arch=SMALL[family], drop_path_rate=0.0)
    if len(model.backbone.get('out_indices', ())) == 4:
        model.backbone.out_indices = (0, 1, 2, 3)
    if model.backbone.get('window_size'):
        model.backbone.update(window_size=3, global_attn_indexes=(1, 3))
    if cfg.default_scope == 'mmdet':
        model.data_preprocessor.batch_augments = None
        model.neck.update(in_channels=width, out_channels=width)
        model.rpn_head.update(in_channels=width, feat_channels=width)
        model.roi_head.bbox_head.update(in_channels=width, conv_out_channels=width, fc_out_channels=32)
        model.roi_head.mask_head.update(in_channels=width, conv_out_channels=width)
        for extractor in (model.roi_head.bbox_roi_extractor, model.roi_head.mask_roi_extractor):
            extractor.out_channels = width
    elif cfg.default_scope == 'mmseg':
        model.neck.embed_dim = width
        model.decode_head.update(in_channels=[width] * 4, channels=width)
        model.auxiliary_head.update(in_channels=width, channels=width)
        model.data_preprocessor.size = size
    else:
        model.head.in_channels = width
        model.data_preprocessor = cfg.data_preprocessor  # as a runner does
    return model


def samples(scope, sizes):
    """Images and their truth, as the host's pipeline packs them."""
    torch.manual_seed(0)
    inputs = [torch.randint(0, 256, (3, *size), dtype=torch.uint8) for size in sizes]
    data = []
    for h, w in sizes:
        meta = dict(img_shape=(h, w), ori_shape=(h, w), pad_shape=(h, w), scale_factor=(1.0, 1.0))
        if scope == 'mmdet':
            from mmdet.structures import DetDataSample
            from mmdet.structures.mask import BitmapMasks

            sample = DetDataSample(metainfo=meta)
            mask = np.zeros((1, h, w), np.uint8)
            mask[0, h // 4 : h // 2, w // 4 : 3 * w // 4] = 1
            sample.gt_instances = InstanceData(
                bboxes=torch.tensor([[w / 4, h / 4, 3 * w / 4, h / 2]]),
                labels=torch.tensor([0]),
                masks=BitmapMasks(mask, h, w),
            )
        elif scope == 'mmseg':
            from mmseg.structures import SegDataSample

            sample = SegDataSample(metainfo=meta)
            sample.gt_sem_seg = PixelData(data=torch.randint(0, 3, (1, h, w)))
        else:
            from mmpretrain.structures import DataSample

            sample = DataSample(metainfo=meta).set_gt_label(1)
        data.append(sample)
    return dict(inputs=inputs, data_samples=data)


@pytest.mark.parametrize('name', NAMES)
def test_one_training_step_and_one_prediction_at_a_reduced_size(load, name):
    """On images of two sizes, none a multiple of the patch; slide tests have a crop larger than the image."""
    torch.manual_seed(0)
    cfg = load(name)
    sizes = [(64, 64)] * 2 if cfg.default_scope == 'mmpretrain' else [(90, 70), (60, 70)]
    model = MODELS.build(reduced(cfg, name.partition('/')[0], sizes[0]))
    check_training_and_prediction(cfg, model, sizes)


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
    cfg.model.backbone.drop_path_rate = 0.0  # else whole blocks may get no gradient
    if cfg.default_scope == 'mmpretrain':
        cfg.model.data_preprocessor = cfg.data_preprocessor  # as a runner does
    check_training_and_prediction(cfg, MODELS.build(cfg.model), [size] * (1 if cfg.default_scope == 'mmdet' else 2))


def check_training_and_prediction(cfg, model, sizes):
    """One step by the config's optimiser moves the whole backbone; the prediction has the size of the image."""
    scope = cfg.default_scope
    model.backbone.init_weights()  # a class token of zeros would stay zero
    wrapper = build_optim_wrapper(model, cfg.optim_wrapper)
    before = {key: parameter.detach().clone() for key, parameter in model.named_parameters()}
    log = model.train().train_step(samples(scope, sizes), wrapper)
    assert log and all(torch.isfinite(value).all() for value in log.values())
    stayed = [key for key, parameter in model.named_parameters() if torch.equal(parameter, before[key])]
    assert not [key for key in stayed if key.startswith('backbone') and not key.endswith('qkv.bias')]
    with torch.no_grad():
        predictions = model.eval().test_step(samples(scope, sizes[:1]))
    if scope == 'mmdet':
        assert predictions[0].pred_instances.masks.shape == (len(predictions[0].pred_instances.bboxes), *sizes[0])
    elif scope == 'mmseg':
        assert predictions[0].pred_sem_seg.data.shape == (1, *sizes[0])
    else:
        assert predictions[0].pred_score.sum() == pytest.approx(1)


# ---- recipes


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
    assert found['backbone.pos_embed'] == pytest.approx((1e-4 * 0.7**13, 0))
    # over all blocks the rates fall alike
    assert found['backbone.pos_embed'][0] == pytest.approx(wanted['backbone.pos_embed'][0], rel=0.2)
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
    assert found['backbone.layers.23.mixer.in_proj.weight'][0] == pytest.approx(lr * layer_decay)
    assert found['backbone.layers.0.mixer.in_proj.weight'][0] == pytest.approx(lr * layer_decay**24)
    assert found['backbone.pos_embed'] == pytest.approx((lr * layer_decay**25, 0))
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


@pytest.mark.parametrize('size', ['ti', 's'])
def test_long_sequence_fine_tuning(load, size):
    cfg = load(f'vim/vim-{size}-stride8_8xb128-30e_in1k.py')
    backbone = MODELS.build(cfg.model.backbone)
    assert backbone.grid == (27, 27) and backbone.patch_embed.proj.kernel_size == (16, 16)
    assert cfg.train_cfg.max_epochs == 30 and not cfg.param_scheduler
    assert rates(cfg)['head.fc.weight'] == pytest.approx((1e-5, 1e-8))


# ---- published files

PUBLISHED_CLASSIFIER = """
_base_ = '{config}'

model = dict(
    backbone=dict(arch=dict(_delete_=True, {arch}), img_size=(64, 48)),
    head=dict(num_classes=4, in_channels=32),
    train_cfg=None,
)
test_pipeline = [dict(type='LoadImageFromFile'), dict(type='PackInputs')]
test_dataloader = dict(
    batch_size=4,
    num_workers=0,
    dataset=dict(
        _delete_=True, type='CustomDataset', data_root='images', pipeline=test_pipeline, classes=['a', 'b', 'c', 'd']
    ),
)
test_evaluator = dict(topk=1)
train_dataloader = val_dataloader = train_cfg = val_cfg = val_evaluator = optim_wrapper = param_scheduler = None
"""


@pytest.mark.parametrize('name', ['vim/vim-ti_8xb128_in1k.py', 'deit/deit-ti_8xb128_in1k.py'])
def test_a_published_classifier_evaluates_as_downloaded(tmp_path, monkeypatch, name):
    """tools/test.py with the file itself: scores are those of backbone and head computed by hand."""
    family = name.partition('/')[0]
    torch.manual_seed(0)
    backbone = (VisionMamba if family == 'vim' else VisionTransformer)(SMALL[family], img_size=64).eval()
    head = nn.Linear(32, 4)
    for parameter in backbone.parameters():
        nn.init.normal_(parameter, std=0.2)
    weights = {**backbone.state_dict(), **{f'head.{key}': value for key, value in head.state_dict().items()}}
    torch.save({'model': weights, 'epoch': 299}, tmp_path / 'published.pth')

    images = np.random.default_rng(0).integers(0, 256, (6, 64, 48, 3), dtype=np.uint8)
    for i, image in enumerate(images):
        (tmp_path / 'images' / 'abcd'[i % 4]).mkdir(parents=True, exist_ok=True)
        cv2.imwrite(str(tmp_path / 'images' / 'abcd'[i % 4] / f'{i}.png'), image[..., ::-1])
    arch = ', '.join(f'{key}={value!r}' for key, value in SMALL[family].items())
    (tmp_path / 'c.py').write_text(PUBLISHED_CLASSIFIER.format(config=CONFIGS / name, arch=arch))
    monkeypatch.chdir(tmp_path)
    arguments = ['c.py', 'published.pth', '--work-dir', 'work', '--out', 'out.pkl']
    cli.run(cli.test, cli.test_parser().parse_args(arguments))

    mean, std = np.float32([123.675, 116.28, 103.53]), np.float32([58.395, 57.12, 57.375])
    with torch.no_grad():
        x = torch.from_numpy((images.astype(np.float32) - mean) / std).permute(0, 3, 1, 2)
        expected = head(backbone(x)[0]).softmax(1)
    assert expected.std() > 0.01
    predictions = {int(Path(p['img_path']).stem): p for p in pickle.loads((tmp_path / 'out.pkl').read_bytes())}
    assert sorted(predictions) == list(range(6))
    for i, prediction in predictions.items():
        torch.testing.assert_close(prediction['pred_score'], expected[i], rtol=1e-4, atol=1e-5)
        assert prediction['gt_label'].item() == i % 4
