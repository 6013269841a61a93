"""The MambaVision configs state the published recipe, and evaluate published files."""

import resource

import pytest
import torch
from config_runs import CONFIGS, FORMER, SMALL, check_published_classifier, rates, train_and_predict
from mmengine.optim import build_optim_wrapper
from mmengine.registry import MODELS, PARAM_SCHEDULERS
from torch import nn

from mmvim.models import MambaVision

FILES = sorted(path.name for path in (CONFIGS / 'mambavision').glob('*.py'))
OTHERS = ('mambavision/upernet_r18_camvid-240x180.py', *FORMER)  # a control
NAMES = [name for name in FILES if f'mambavision/{name}' not in OTHERS]
CASCADE = 'cascade-mask-rcnn_mambavision-{}_fpn_4conv1fc-giou_amp-ms-crop-3x_coco.py'
UPERNET = 'upernet_mambavision-{}_8xb2-160k_ade20k-512x512.py'


@pytest.fixture
def load(load):
    return lambda name: load(f'mambavision/{name}')


def test_all_that_was_promised_is_there():
    promised = [CASCADE.format(size) for size in 'tsb'] + [UPERNET.format(size) for size in 'tsb']
    promised += [f'mambavision-{size}_32xb128_in1k.py' for size in ('t', 't2', 's', 'b', 'l', 'l2')]
    promised += [f'mambavision-{size}_32xb128_in1k-512px.py' for size in ('l2', 'l3')]
    promised.append('mambavision-l3_32xb128_in1k-256px.py')
    promised += [f'mask-rcnn_mambavision-{size}_fpn_amp-ms-crop-3x_coco.py' for size in 'ts']
    promised += ['mask-rcnn_mambavision-t_fpn_1x_coco.py', 'upernet_mambavision-l3_8xb2-160k_ade20k-640x640.py']
    promised += ['mask-rcnn_mambavision-t_fpn_folder.py', 'upernet_mambavision-t_folder.py', 'mambavision-t_folder.py']
    promised += ['upernet_mambavision-t_camvid-240x180.py']
    assert set(promised) <= set(NAMES)
    assert len(NAMES) == len(promised) + len([name for name in NAMES if 'attention' in name or 'mixer' in name])


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
    cfg.optim_wrapper.update(type='OptimWrapper')  # float16 is emulated on most CPUs
    cfg.optim_wrapper.pop('dtype', None)
    model = MODELS.build(cfg.model)
    model.init_weights()
    assert not [key for key in train_and_predict(cfg, model, [size] * count) if key.startswith('backbone')]
    print(f'{name}: peak resident memory {resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 2**20:.1f} GiB')


# size: drop path, learning rate, windows of levels 2 and 3
COCO = dict(t=(0.2, 1e-4), s=(0.3, 1e-4), b=(0.5, 2e-4))
ADE20K = dict(t=(0.3, 5e-5, (64, 32)), s=(0.7, 6e-5, (160, 56)), b=(0.4, 5e-5, (64, 32)))
ARCHS = dict(t='tiny', t2='tiny2', s='small', b='base', l='large', l2='large2', l3='large3')


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
    assert cfg.auto_scale_lr.base_batch_size == 16
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
        ('l3-256px', 0.3, 256, 256),
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


@pytest.mark.parametrize('prefix', ['module.', 'model.'])
def test_a_published_classifier_evaluates_as_downloaded(tmp_path, monkeypatch, prefix):
    monkeypatch.chdir(tmp_path)
    settings = dict(window_sizes=(8, 8, 4, 2))
    check_published_classifier(
        tmp_path,
        'mambavision/mambavision-t_32xb128_in1k.py',
        MambaVision(SMALL[MambaVision], out_type='avg_featmap', **settings),
        dict(arch=dict(_delete_=True, **SMALL[MambaVision]), **settings),
        lambda weights, path: torch.save({'state_dict': {prefix + key: value for key, value in weights.items()}}, path),
    )


def test_the_control_differs_from_mambavision_in_backbone_and_iterations_alone(load):
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
        assert cfg.train_cfg.pop('max_iters') == cfg.param_scheduler[-1].pop('end') == cfg.pop('max_iters')
    assert ours.to_dict() == control.to_dict()


def test_what_is_not_labelled_counts_nowhere(load):
    cfg = load('upernet_mambavision-t_camvid-240x180.py')
    crop = next(step for step in cfg.train_dataloader.dataset.pipeline if step.type == 'RandomCrop')
    model = cfg.model
    parts = (cfg.val_evaluator, cfg.val_dataloader.dataset, crop, model.decode_head, model.auxiliary_head)
    assert {part.ignore_index for part in parts} == {model.data_preprocessor.seg_pad_val} == {11}
    assert model.decode_head.num_classes == model.auxiliary_head.num_classes == 11
