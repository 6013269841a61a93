"""Every MambaVision config builds, trains and predicts at a reduced size, and states the published recipe."""

import copy
import pickle
import resource
from importlib import import_module
from pathlib import Path

import cv2
import numpy as np
import pytest
import torch
import yaml
from mmengine.optim import build_optim_wrapper
from mmengine.registry import MODELS, PARAM_SCHEDULERS, init_default_scope
from mmengine.structures import InstanceData, PixelData
from torch import nn

from mmvim import cli
from mmvim.models import MambaVision

CONFIGS = Path(__file__).parents[2] / 'configs'
FILES = sorted(path.name for path in (CONFIGS / 'mambavision').glob('*.py'))
NAMES = [name for name in FILES if name != 'upernet_r18_camvid-240x180.py']  # a control
DEMOS = ['demo/mask_rcnn_mambavision_shapes.py', 'demo/upernet_mambavision_shapes.py']
CASCADE = 'cascade-mask-rcnn_mambavision-{}_fpn_4conv1fc-giou_amp-ms-crop-3x_coco.py'
UPERNET = 'upernet_mambavision-{}_8xb2-160k_ade20k-512x512.py'
WIDTH = 16
SMALL = dict(embed_dims=WIDTH, stem_channels=8, depths=(1, 1, 3, 2), num_heads=(1, 2, 4, 8))


@pytest.fixture
def load(load_config, tmp_path):
    (tmp_path / 'a.json').write_text('{"images": [], "annotations": [], "categories": [{"id": 1, "name": "a"}]}')

    def read(name):
        keys = dict(data_root=str(tmp_path), train_ann='a.json', val_ann='a.json') if 'folder' in name else {}
        cfg = load_config(name if '/' in name else f'mambavision/{name}', **keys)
        init_default_scope(cfg.default_scope)
        import_module(f'{cfg.default_scope}.models')  # not first under torch.device('meta')
        return cfg

    return read


def part_of(cfg):
    """'detection', 'segmentation' or 'classification'."""
    return dict(mmdet='detection', mmseg='segmentation', mmpretrain='classification')[cfg.default_scope]


def wanted_channels(cfg):
    """Channels of the backbone's outputs that the parts behind it are built for."""
    model = cfg.model
    if part_of(cfg) == 'detection':
        return tuple(model.neck.in_channels)
    if part_of(cfg) == 'segmentation':
        assert model.auxiliary_head.in_channels == model.decode_head.in_channels[model.auxiliary_head.in_index]
        return tuple(model.decode_head.in_channels)
    return (model.head.in_channels,)


def test_all_that_was_promised_is_there():
    promised = [CASCADE.format(size) for size in 'tsb'] + [UPERNET.format(size) for size in 'tsb']
    promised += [f'mambavision-{size}_32xb128_in1k.py' for size in ('t', 't2', 's', 'b', 'l', 'l2')]
    promised += [f'mambavision-{size}_32xb128_in1k-512px.py' for size in ('l2', 'l3')]
    promised += [f'mask-rcnn_mambavision-{size}_fpn_amp-ms-crop-3x_coco.py' for size in 'ts']
    promised += ['mask-rcnn_mambavision-t_fpn_1x_coco.py', 'upernet_mambavision-l3_8xb2-160k_ade20k-640x640.py']
    promised += ['mask-rcnn_mambavision-t_fpn_coco-folder.py', 'upernet_mambavision-t_camvid-240x180.py']
    assert set(promised) <= set(NAMES)
    assert len(NAMES) == len(promised) + len([name for name in NAMES if 'attention' in name or 'mixer' in name])


def test_the_metafile_lists_every_config():
    listed = yaml.safe_load((CONFIGS / 'mambavision' / 'metafile.yml').read_text())['Models']
    assert sorted(model['Config'].rpartition('/')[2] for model in listed) == FILES
    assert all(model['Config'] == f'configs/mambavision/{model["Name"]}.py' for model in listed)


@pytest.mark.parametrize('name', [*NAMES, *DEMOS])
def test_full_size_models_build_and_all_parts_fit(load, name):
    cfg = load(name)
    with torch.device('meta'):
        model = MODELS.build(cfg.model)
    assert isinstance(model.backbone, MambaVision)
    assert model.backbone.out_channels == wanted_channels(cfg)
    if part_of(cfg) == 'detection':
        strides = [stride for stride, _ in model.rpn_head.prior_generator.strides]
        assert tuple(strides[:4]) == model.backbone.out_strides
    groups = build_optim_wrapper(model, cfg.optim_wrapper).optimizer.param_groups
    assert sum(len(group['params']) for group in groups) == sum(p.requires_grad for p in model.parameters())


def reduced(cfg, size):
    """The config with a small backbone, windows to match, and small heads."""
    model = copy.deepcopy(cfg.model)
    channels = [WIDTH * 2**i for i in range(4)]
    arch = model.backbone.arch
    layer_scale = MambaVision.arch_zoo[arch].get('layer_scale') if isinstance(arch, str) else None
    model.backbone.update(arch=dict(SMALL, layer_scale=layer_scale), window_sizes=(8, 8, 5, 3))
    if part_of(cfg) == 'detection':
        model.neck.update(in_channels=channels, out_channels=WIDTH)
        model.rpn_head.update(in_channels=WIDTH, feat_channels=WIDTH)
        heads = model.roi_head.bbox_head if isinstance(model.roi_head.bbox_head, list) else [model.roi_head.bbox_head]
        for head in heads:
            head.update(in_channels=WIDTH, fc_out_channels=32)
            if 'conv_out_channels' in head:
                head.update(conv_out_channels=WIDTH)
        model.roi_head.mask_head.update(in_channels=WIDTH, conv_out_channels=WIDTH)
        for extractor in (model.roi_head.bbox_roi_extractor, model.roi_head.mask_roi_extractor):
            extractor.out_channels = WIDTH
    elif part_of(cfg) == 'segmentation':
        model.decode_head.update(in_channels=channels, channels=WIDTH)
        model.auxiliary_head.update(in_channels=channels[2], channels=WIDTH)
        model.data_preprocessor.size = size
    else:
        model.head.in_channels = channels[3]
        model.data_preprocessor = cfg.data_preprocessor  # as a runner does
    return model


def samples(kind, size, count=2):
    """Images and their truth, as the host's pipeline packs them."""
    torch.manual_seed(0)
    inputs = [torch.randint(0, 256, (3, *size), dtype=torch.uint8) for _ in range(count)]
    meta = dict(img_shape=size, ori_shape=size, pad_shape=size, scale_factor=(1.0, 1.0))
    data = []
    for _ in range(count):
        if kind == 'detection':
            from mmdet.structures import DetDataSample
            from mmdet.structures.mask import BitmapMasks

            sample = DetDataSample(metainfo=meta)
            h, w = size
            mask = np.zeros((1, h, w), np.uint8)
            mask[0, h // 4 : h // 2, w // 4 : 3 * w // 4] = 1
            sample.gt_instances = InstanceData(
                bboxes=torch.tensor([[w / 4, h / 4, 3 * w / 4, h / 2]]),
                labels=torch.tensor([0]),
                masks=BitmapMasks(mask, h, w),
            )
        elif kind == 'segmentation':
            from mmseg.structures import SegDataSample

            sample = SegDataSample(metainfo=meta)
            sample.gt_sem_seg = PixelData(data=torch.randint(0, 3, (1, *size)))
        else:
            from mmpretrain.structures import DataSample

            sample = DataSample(metainfo=meta).set_gt_label(1)
        data.append(sample)
    return dict(inputs=inputs, data_samples=data)


def train_and_predict(cfg, model, size, count=2):
    """One step by the config's optimiser; returns losses, names of parameters that stayed, and predictions."""
    kind = part_of(cfg)
    if cfg.optim_wrapper.get('dtype') == 'float16':
        cfg.optim_wrapper.loss_scale = 1.0  # the first steps of dynamic scaling are skipped
    wrapper = build_optim_wrapper(model, cfg.optim_wrapper)
    before = {name: parameter.detach().clone() for name, parameter in model.named_parameters()}
    log = model.train().train_step(samples(kind, size, count), wrapper)
    stayed = [name for name, parameter in model.named_parameters() if torch.equal(parameter, before[name])]
    with torch.no_grad():
        predictions = model.eval().test_step(samples(kind, size, count))
    return log, stayed, predictions


def check(cfg, log, stayed, predictions, size):
    assert log and all(torch.isfinite(value).all() for value in log.values())
    # no shift before a softmax over keys has an effect; which boxes are drawn decides what else gets no gradient
    stayed = [name for name in stayed if name.startswith('backbone') and not name.endswith('qkv.bias')]
    assert not stayed
    kind = part_of(cfg)
    for predicted in predictions:
        if kind == 'detection':
            assert predicted.pred_instances.masks.shape == (len(predicted.pred_instances.bboxes), *size)
        elif kind == 'segmentation':
            assert predicted.pred_sem_seg.data.shape == (1, *size)
        else:
            assert predicted.pred_score.sum() == pytest.approx(1)


@pytest.mark.parametrize('name', [*NAMES, *DEMOS])
def test_one_training_step_and_one_prediction_at_a_reduced_size(load, name):
    torch.manual_seed(0)
    cfg = load(name)
    size = (96, 64) if part_of(cfg) != 'classification' else (64, 64)
    model = MODELS.build(reduced(cfg, size))
    for module in model.modules():
        if type(module).__name__ == 'DropPath':
            module.drop_prob = 0.0  # else whole blocks may get no gradient from the two images
        if getattr(module, 'layer_scale', None):
            nn.init.ones_(module.gamma_1)
            nn.init.ones_(module.gamma_2)
    check(cfg, *train_and_predict(cfg, model, size), size)


@pytest.mark.slow  # python -m pytest -m slow
@pytest.mark.parametrize(
    ('name', 'size', 'count'),
    [
        ('mask-rcnn_mambavision-t_fpn_1x_coco.py', (800, 1344), 1),
        (CASCADE.format('t'), (800, 1344), 1),
        (UPERNET.format('t'), (512, 512), 2),
        ('mambavision-t_32xb128_in1k.py', (224, 224), 2),
    ],
)
def test_one_training_step_and_one_prediction_at_full_size(load, name, size, count):
    torch.manual_seed(0)
    cfg = load(name)
    cfg.model.backbone.drop_path_rate = 0.0
    cfg.optim_wrapper.update(type='OptimWrapper')  # float16 is emulated on most CPUs
    cfg.optim_wrapper.pop('dtype', None)
    if 'data_preprocessor' not in cfg.model:
        cfg.model.data_preprocessor = cfg.data_preprocessor  # as a runner does
    model = MODELS.build(cfg.model)
    model.init_weights()
    check(cfg, *train_and_predict(cfg, model, size, count), size)
    print(f'{name}: peak resident memory {resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 2**20:.1f} GiB')


# size: drop path, learning rate, windows of levels 2 and 3
COCO = dict(t=(0.2, 1e-4), s=(0.3, 1e-4), b=(0.5, 2e-4))
ADE20K = dict(t=(0.3, 5e-5, (64, 32)), s=(0.7, 6e-5, (160, 56)), b=(0.4, 5e-5, (64, 32)))
ARCHS = dict(t='tiny', t2='tiny2', s='small', b='base', l='large', l2='large2', l3='large3')


def rates(cfg):
    with torch.device('meta'):
        model = MODELS.build(cfg.model)
    groups = build_optim_wrapper(model, cfg.optim_wrapper).optimizer.param_groups
    names = {id(parameter): name for name, parameter in model.named_parameters()}
    return {names[id(p)]: (g['lr'], g['weight_decay']) for g in groups for p in g['params']}


@pytest.mark.parametrize('size', COCO)
def test_the_published_detection_recipe(load, size):
    drop_path, lr = COCO[size]
    names = [CASCADE.format(size)]
    names += [name for name in NAMES if name.startswith(f'mask-rcnn_mambavision-{size}_') and 'folder' not in name]
    assert len(names) == dict(t=3, s=2, b=1)[size]
    for name in names:
        cfg = load(name)
        backbone = cfg.model.backbone
        assert (backbone.arch, backbone.drop_path_rate) == (ARCHS[size], drop_path)
        assert backbone.window_sizes[2:] == (112, 56) and not backbone.get('fit_windows')
        found = rates(cfg)
        assert found['backbone.levels.2.blocks.0.mlp.fc1.weight'] == pytest.approx((lr, 0.05))
        assert found['backbone.levels.2.blocks.0.norm1.weight'] == pytest.approx((lr, 0))
        assert found['backbone.patch_embed.conv_down.1.weight'] == found['backbone.outnorm0.bias'] == (lr, 0)
        assert cfg.auto_scale_lr.base_batch_size == 16
        assert cfg.train_cfg.max_epochs == (12 if '_1x_' in name else 36)
        assert cfg.param_scheduler[1].milestones == ([8, 11] if '_1x_' in name else [27, 33])
        assert cfg.optim_wrapper.type == ('OptimWrapper' if '_1x_' in name else 'mmvim.AmpOptimWrapper')
        assert any(step.type == 'RandomChoice' for step in cfg.train_dataloader.dataset.pipeline) == ('3x' in name)
        if 'cascade' in name:
            heads = cfg.model.roi_head.bbox_head
            assert all(h.num_shared_convs == 4 and h.num_shared_fcs == 1 and h.norm_cfg.type == 'SyncBN' for h in heads)
            assert all(h.loss_bbox.type == 'GIoULoss' and h.loss_bbox.loss_weight == 10 for h in heads)


@pytest.mark.parametrize('size', ADE20K)
def test_the_published_segmentation_recipe(load, size):
    drop_path, lr, windows = ADE20K[size]
    cfg = load(UPERNET.format(size))
    backbone = cfg.model.backbone
    assert (backbone.arch, backbone.drop_path_rate, backbone.window_sizes[2:]) == (ARCHS[size], drop_path, windows)
    assert rates(cfg)['backbone.levels.3.blocks.0.mixer.in_proj.weight'] == pytest.approx((lr, 0.01))
    assert rates(cfg)['backbone.levels.3.blocks.0.mixer.A_log'] == pytest.approx((lr, 0))
    assert cfg.train_cfg.max_iters == 160000 and cfg.train_dataloader.batch_size == 2
    warmup, decay = cfg.param_scheduler
    assert (warmup.end, decay.begin, decay.end, decay.power, decay.eta_min) == (1500, 1500, 160000, 1.0, 0.0)
    assert cfg.model.decode_head.num_classes == cfg.model.auxiliary_head.num_classes == 150
    assert cfg.model.data_preprocessor.size == (512, 512)


def test_the_segmentation_recipe_at_640(load):
    cfg = load('upernet_mambavision-l3_8xb2-160k_ade20k-640x640.py')
    train, test = cfg.train_dataloader.dataset.pipeline, cfg.val_dataloader.dataset.pipeline
    assert cfg.model.backbone.arch == 'large3' and cfg.model.backbone.window_sizes[2:] == (64, 32)
    assert cfg.model.data_preprocessor.size == train[3].crop_size == (640, 640)
    assert train[2].scale == test[1].scale == (2560, 640)
    assert cfg.test_dataloader == cfg.val_dataloader


@pytest.mark.parametrize(
    ('name', 'drop_path', 'resize', 'crop'),
    [
        ('t', 0.2, 224, 224),
        ('t2', 0.2, 228, 224),
        ('s', 0.2, 240, 224),
        ('b', 0.3, 224, 224),
        ('l', 0.3, 224, 224),
        ('l2', 0.3, 224, 224),
        ('l2-512px', 0.3, 512, 512),
        ('l3-512px', 0.3, 512, 512),
    ],
)
def test_the_published_classification_recipe(load, name, drop_path, resize, crop):
    size, _, pixels = name.partition('-')
    cfg = load(f'mambavision-{size}_32xb128_in1k{"-" * bool(pixels)}{pixels}.py')
    backbone = cfg.model.backbone
    assert (backbone.arch, backbone.drop_path_rate, backbone.out_type) == (ARCHS[size], drop_path, 'avg_featmap')
    assert backbone.get('window_sizes', (8, 8, 14, 7))[2:] == (crop // 16, crop // 32)
    for loader in (cfg.val_dataloader, cfg.test_dataloader):
        assert loader.dataset.pipeline[1].scale == resize and loader.dataset.pipeline[2].crop_size == crop
    assert cfg.train_dataloader.dataset.pipeline[1].scale == crop
    assert cfg.auto_scale_lr.base_batch_size == 4096 == 32 * cfg.train_dataloader.batch_size
    assert rates(cfg)['backbone.levels.2.blocks.0.mlp.fc1.weight'] == pytest.approx((5e-3, 0.05))
    warmup, cosine = cfg.param_scheduler
    assert cfg.train_cfg.max_epochs == cosine.end == 300 and warmup.end == cosine.begin == 20 == 300 - cosine.T_max
    wrapper = build_optim_wrapper(nn.Linear(2, 2), cfg.optim_wrapper)
    assert type(wrapper.optimizer).__name__ == 'Lamb'
    PARAM_SCHEDULERS.build({**cosine, 'optimizer': wrapper})


PATTERNS = {
    'attention-early': dict(attention='early'),
    'attention-middle': dict(attention='middle'),
    'attention-every2': dict(attention=2),
    'attention-none': dict(attention='none'),
    'attention-all': dict(attention='all'),
    'mixer-mamba': dict(mixer_conv='causal', mixer_symmetric=False, mixer_merge='gate'),
    'mixer-regular': dict(mixer_symmetric=False, mixer_merge='gate'),
    'mixer-gate': dict(mixer_merge='gate'),
}


def test_ablations_differ_from_the_published_model_in_one_thing(load):
    published = load('mambavision-t_32xb128_in1k.py').to_dict()
    found = {name for name in NAMES if 'attention' in name or 'mixer' in name}
    assert found == {f'mambavision-t-{pattern}_32xb128_in1k.py' for pattern in PATTERNS}
    for pattern, settings in PATTERNS.items():
        cfg = load(f'mambavision-t-{pattern}_32xb128_in1k.py').to_dict()
        backbone = cfg['model']['backbone']
        assert {key: backbone.pop(key) for key in settings} == settings
        assert cfg == published


PUBLISHED_CLASSIFIER = """
_base_ = '{configs}/mambavision/mambavision-t_32xb128_in1k.py'

model = dict(
    backbone=dict(arch=dict(_delete_=True, {arch}), window_sizes=(8, 8, 4, 2)),
    head=dict(num_classes=4, in_channels=128),
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


@pytest.mark.parametrize('prefix', ['module.', 'model.'])
def test_a_published_classifier_evaluates_as_downloaded(tmp_path, monkeypatch, prefix):
    """tools/test.py with the file itself: scores are those of backbone and head computed by hand."""
    torch.manual_seed(0)
    backbone, head = MambaVision(SMALL, out_type='avg_featmap', window_sizes=(8, 8, 4, 2)).eval(), nn.Linear(128, 4)
    for parameter in backbone.parameters():
        nn.init.normal_(parameter, std=0.2)
    weights = {**backbone.state_dict(), **{f'head.{name}': value for name, value in head.state_dict().items()}}
    torch.save({'state_dict': {prefix + name: value for name, value in weights.items()}}, tmp_path / 'm.pth.tar')

    images = np.random.default_rng(0).integers(0, 256, (6, 64, 48, 3), dtype=np.uint8)
    for i, image in enumerate(images):
        (tmp_path / 'images' / 'abcd'[i % 4]).mkdir(parents=True, exist_ok=True)
        cv2.imwrite(str(tmp_path / 'images' / 'abcd'[i % 4] / f'{i}.png'), image[..., ::-1])
    arch = ', '.join(f'{key}={value!r}' for key, value in SMALL.items())
    (tmp_path / 'c.py').write_text(PUBLISHED_CLASSIFIER.format(configs=CONFIGS, arch=arch))
    monkeypatch.chdir(tmp_path)
    arguments = ['c.py', 'm.pth.tar', '--work-dir', 'work', '--out', 'out.pkl']
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


def test_the_control_differs_from_mambavision_in_the_backbone_alone(load):
    ours, control = load('upernet_mambavision-t_camvid-240x180.py'), load('upernet_r18_camvid-240x180.py')
    with torch.device('meta'):
        backbone = MODELS.build({**control.model.backbone, '_scope_': 'mmseg'})
        shapes = [out.shape[1] for out in backbone(torch.empty(1, 3, 64, 64))]
    assert shapes == control.model.decode_head.in_channels
    assert control.model.auxiliary_head.in_channels == shapes[2]
    for cfg in (ours, control):
        cfg.model.pop('backbone')
        cfg.model.decode_head.pop('in_channels')
        cfg.model.auxiliary_head.pop('in_channels')
    assert ours.to_dict() == control.to_dict()


def test_what_is_not_labelled_counts_nowhere(load):
    cfg = load('upernet_mambavision-t_camvid-240x180.py')
    crop = next(step for step in cfg.train_dataloader.dataset.pipeline if step.type == 'RandomCrop')
    model = cfg.model
    parts = (cfg.val_evaluator, cfg.val_dataloader.dataset, crop, model.decode_head, model.auxiliary_head)
    assert {part.ignore_index for part in parts} == {model.data_preprocessor.seg_pad_val} == {11}
    assert model.decode_head.num_classes == model.auxiliary_head.num_classes == 11
