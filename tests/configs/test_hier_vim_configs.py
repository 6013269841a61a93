"""Every Hier-Vim and ablation config builds, trains and predicts at a reduced size, and differs where it says."""

import copy
import functools
import re
from importlib import import_module
from pathlib import Path

import numpy as np
import pytest
import torch
import torch.nn.functional as F
import yaml
from mmengine.optim import build_optim_wrapper
from mmengine.registry import MODELS, init_default_scope
from mmengine.structures import InstanceData, PixelData

from mmvim.models import HierVim, VisionMamba

CONFIGS = Path(__file__).parents[2] / 'configs'
HIER_VIM = sorted(f'hier_vim/{path.name}' for path in (CONFIGS / 'hier_vim').glob('*.py'))
ABLATIONS = sorted(f'vim_ablations/{path.name}' for path in (CONFIGS / 'vim_ablations').glob('*.py'))
NAMES = HIER_VIM + ABLATIONS
WIDTH = 16
SMALL = dict(HierVim=dict(embed_dims=WIDTH, depths=(1, 1, 2, 1)), VisionMamba=dict(embed_dims=WIDTH, depth=2))
STRATEGIES = dict(none='none', sequence='sequence', block='block', ssm='v1')
CLASSIFICATION = dict(
    mean=dict(cls_token=None, out_type='avg_featmap'),
    max=dict(cls_token=None, out_type='raw'),
    head=dict(cls_token='head'),
    double=dict(cls_token='double'),
)
IMAGENET = 'vim_ablations/vim-ti-{}_8xb128_in1k.py'
SEGMENTER = 'vim_ablations/segmenter_vim-ti{}_8xb2-160k_ade20k-512x512.py'


@pytest.fixture(scope='module')
def read(load_config, tmp_path_factory):
    """Read a config, each but once: mmengine reads all metafiles of a host for each base that is a host's."""
    folder = tmp_path_factory.mktemp('data')
    classes = '[{"id": 1, "name": "a"}, {"id": 2, "name": "b"}]'
    (folder / 'a.json').write_text(f'{{"images": [], "annotations": [], "categories": {classes}}}')

    @functools.cache
    def read(name):
        keys = dict(data_root=str(folder), train_ann='a.json', val_ann='a.json') if 'folder' in name else {}
        return load_config(name, **keys)

    return read


@pytest.fixture
def load(read):
    def load(name):
        cfg = copy.deepcopy(read(name))
        init_default_scope(cfg.default_scope)
        import_module(f'{cfg.default_scope}.models')  # not first under torch.device('meta')
        if 'data_preprocessor' not in cfg.model:
            cfg.model.data_preprocessor = cfg.data_preprocessor  # as a runner does
        return cfg

    return load


def test_all_that_was_promised_is_there():
    names = [f'hier-vim-{size}_16xb64_in1k.py' for size in 'tsb']
    names += [f'mask-rcnn_hier-vim-{size}_fpn_1x_coco.py' for size in 'tsb']
    names.append('mask-rcnn_hier-vim-t_fpn_coco-folder.py')
    names += [f'upernet_hier-vim-{size}_8xb2-160k_ade20k-512x512.py' for size in 'tsb']
    assert HIER_VIM == sorted(f'hier_vim/{name}' for name in names)
    names = [IMAGENET.format(name) for name in (*STRATEGIES, *(f'cls-{design}' for design in CLASSIFICATION))]
    names += [SEGMENTER.format(f'-{name}') for name in STRATEGIES] + [SEGMENTER.format('')]
    assert ABLATIONS == sorted(names)


@pytest.mark.parametrize('folder', ['hier_vim', 'vim_ablations'])
def test_the_metafile_lists_every_config(folder):
    listed = yaml.safe_load((CONFIGS / folder / 'metafile.yml').read_text())['Models']
    names = [name.partition('/')[2] for name in NAMES if name.startswith(f'{folder}/')]
    assert sorted(model['Config'].rpartition('/')[2] for model in listed) == names
    assert all(model['Config'] == f'configs/{folder}/{model["Name"]}.py' for model in listed)
    readme = (CONFIGS / folder / 'README.md').read_text()
    assert not [name for name in names if name not in readme]
    index = yaml.safe_load((CONFIGS.parent / 'model-index.yml').read_text())['Import']
    assert f'configs/{folder}/metafile.yml' in index


# S has the widths of T
@pytest.mark.parametrize('name', [name for name in NAMES if 'hier-vim-s_' not in name])
def test_full_size_models_build_and_all_parts_fit(load, name):
    cfg = load(name)
    with torch.device('cpu' if 'segmenter' in name else 'meta'):  # that head reads numbers from tensors
        model = MODELS.build(cfg.model)
    backbone = model.backbone
    assert isinstance(backbone, HierVim if name in HIER_VIM else VisionMamba)
    if cfg.default_scope == 'mmdet':
        assert backbone.out_channels == tuple(cfg.model.neck.in_channels)
        assert backbone.out_strides == tuple(stride for stride, _ in model.rpn_head.prior_generator.strides)[:4]
    elif cfg.default_scope == 'mmpretrain':
        assert backbone.out_channels == (cfg.model.head.in_channels,)
    elif name in HIER_VIM:
        assert backbone.out_channels == tuple(cfg.model.decode_head.in_channels)
        assert backbone.out_channels[2] == cfg.model.auxiliary_head.in_channels
    else:
        assert backbone.out_channels == (cfg.model.decode_head.in_channels,)
        assert len(model.decode_head.layers) == 2 and backbone.final_norm
    groups = build_optim_wrapper(model, cfg.optim_wrapper).optimizer.param_groups
    assert sum(len(group['params']) for group in groups) == sum(p.requires_grad for p in model.parameters())
    decayed = {id(p) for group in groups for p in group['params'] if group['weight_decay']}
    names = dict(backbone.named_parameters())
    assert not [name for name in backbone.no_weight_decay() if id(names[name]) in decayed]


def reduced(cfg, size):
    """The config with a small backbone and small heads."""
    model = copy.deepcopy(cfg.model)
    kind = model.backbone.type.partition('.')[2]
    channels = [WIDTH * 2**i for i in range(4)]
    model.backbone.arch = SMALL[kind]
    if kind == 'VisionMamba':
        model.backbone.img_size = size
    if cfg.default_scope == 'mmdet':
        model.neck.update(in_channels=channels, out_channels=WIDTH)
        model.rpn_head.update(in_channels=WIDTH, feat_channels=WIDTH)
        model.roi_head.bbox_head.update(in_channels=WIDTH, fc_out_channels=32)
        model.roi_head.mask_head.update(in_channels=WIDTH, conv_out_channels=WIDTH)
        for extractor in (model.roi_head.bbox_roi_extractor, model.roi_head.mask_roi_extractor):
            extractor.out_channels = WIDTH
    elif cfg.default_scope == 'mmpretrain':
        model.head.in_channels = channels[3] if kind == 'HierVim' else WIDTH
    elif kind == 'HierVim':
        model.decode_head.update(in_channels=channels, channels=WIDTH)
        model.auxiliary_head.update(in_channels=channels[2], channels=WIDTH)
        model.data_preprocessor.size = size
    else:
        model.decode_head.update(in_channels=WIDTH, channels=WIDTH, embed_dims=WIDTH, num_heads=2)
        model.data_preprocessor.size = size
        model.test_cfg.update(crop_size=(48, 48), stride=(32, 32))
    return model


def samples(scope, size, count=2):
    """Images and their truth, as the host's pipeline packs them."""
    torch.manual_seed(0)
    inputs = [torch.randint(0, 256, (3, *size), dtype=torch.uint8) for _ in range(count)]
    meta = dict(img_shape=size, ori_shape=size, pad_shape=size, scale_factor=(1.0, 1.0))
    data = []
    for i in range(count):
        if scope == 'mmdet':
            from mmdet.structures import DetDataSample
            from mmdet.structures.mask import BitmapMasks

            sample = DetDataSample(metainfo=meta)
            h, w = size
            mask = np.zeros((1, h, w), np.uint8)
            mask[0, h // 4 : h // 2, w // 4 : 3 * w // 4] = 1
            sample.gt_instances = InstanceData(
                bboxes=torch.tensor([[w / 4, h / 4, 3 * w / 4, h / 2]]),
                labels=torch.tensor([i]),
                masks=BitmapMasks(mask, h, w),
            )
        elif scope == 'mmseg':
            from mmseg.structures import SegDataSample

            sample = SegDataSample(metainfo=meta)
            sample.gt_sem_seg = PixelData(data=torch.randint(0, 3, (1, *size)))
        else:
            from mmpretrain.structures import DataSample

            sample = DataSample(metainfo=meta).set_gt_label(i)
        data.append(sample)
    return dict(inputs=inputs, data_samples=data)


# the sizes are the same one when reduced
@pytest.mark.parametrize('name', [name for name in NAMES if not re.search('hier-vim-[sb]_', name)])
def test_one_training_step_and_one_prediction_at_a_reduced_size(load, name):
    torch.manual_seed(0)
    cfg = load(name)
    size = (64, 64) if cfg.default_scope == 'mmpretrain' else (96, 64)
    model = MODELS.build(reduced(cfg, size))
    model.backbone.init_weights()  # a class token of zeros passes nothing on
    for module in model.modules():
        if type(module).__name__ == 'DropPath':
            module.drop_prob = 0.0  # else whole blocks may get no gradient from the two images
    wrapper = build_optim_wrapper(model, cfg.optim_wrapper)
    before = {name: parameter.detach().clone() for name, parameter in model.named_parameters()}
    log = model.train().train_step(samples(cfg.default_scope, size), wrapper)
    assert log and all(torch.isfinite(value).all() for value in log.values())
    stayed = [n for n, p in model.named_parameters() if n.startswith('backbone') and torch.equal(p, before[n])]
    # at the first token, which is the only one read then, the last forward scan has no state that could decay
    assert stayed == (['backbone.layers.1.mixer.A_log'] if 'cls-head' in name else [])
    with torch.no_grad():
        predictions = model.eval().test_step(samples(cfg.default_scope, size))
    for predicted in predictions:
        if cfg.default_scope == 'mmdet':
            assert predicted.pred_instances.masks.shape == (len(predicted.pred_instances.bboxes), *size)
        elif cfg.default_scope == 'mmseg':
            assert predicted.pred_sem_seg.data.shape == (1, *size)
        else:
            assert predicted.pred_score.sum() == pytest.approx(1)


@pytest.mark.parametrize('name', [SEGMENTER.format(''), 'hier_vim/upernet_hier-vim-t_8xb2-160k_ade20k-512x512.py'])
def test_segmentation_of_images_smaller_than_the_crop_and_of_odd_sides(load, name):
    cfg = load(name)
    model = MODELS.build(reduced(cfg, (64, 64))).eval()
    for size in ((37, 45), (81, 33)):
        with torch.no_grad():
            (predicted,) = model.test_step(samples('mmseg', size, 1))
        assert predicted.pred_sem_seg.data.shape == (1, *size)


def test_a_classifier_keeps_the_initial_deltas(load):
    """MMPretrain's Swin config initialises all linear layers, with zero bias, before the backbone does its own."""
    cfg = load('hier_vim/hier-vim-t_16xb64_in1k.py')
    model = MODELS.build(reduced(cfg, (64, 64)))
    model.init_weights()
    dt = F.softplus(model.backbone.stages[2].blocks[0].mixer.dt_proj.bias)
    assert 1e-3 * 0.99 <= dt.min() and dt.max() <= 1e-1 * 1.01
    assert 0 < model.head.fc.weight.std() < 0.03 and model.head.fc.bias.eq(0).all()


def test_classification_designs_differ_from_vim_in_one_thing(load):
    published = load('vim/vim-ti_8xb128_in1k.py').to_dict()
    assert published['model']['backbone'].get('cls_token', 'middle') == 'middle'
    for design, settings in CLASSIFICATION.items():
        cfg = load(IMAGENET.format(f'cls-{design}')).to_dict()
        assert {key: cfg['model']['backbone'].pop(key) for key in settings} == settings
        if design == 'max':
            assert cfg['model']['head'].pop('type') == 'mmvim.TokenMaxClsHead'
            cfg['model']['head']['type'] = 'LinearClsHead'
        assert cfg == published


def test_strategies_differ_in_the_directions_alone(load):
    for base, pattern in ((IMAGENET.format('cls-mean'), IMAGENET), (SEGMENTER.format(''), SEGMENTER)):
        published = load(base).to_dict()
        assert 'directions' not in published['model']['backbone']
        assert published['model']['backbone']['cls_token'] is None
        for strategy, directions in STRATEGIES.items():
            cfg = load(pattern.format(strategy if pattern == IMAGENET else f'-{strategy}')).to_dict()
            assert cfg['model']['backbone'].pop('directions') == directions
            assert cfg == published


@pytest.mark.parametrize(
    'kind',
    ['hier-vim-{}_16xb64_in1k', 'mask-rcnn_hier-vim-{}_fpn_1x_coco', 'upernet_hier-vim-{}_8xb2-160k_ade20k-512x512'],
)
def test_sizes_differ_in_width_depth_and_stochastic_depth(load, kind):
    tiny = load(f'hier_vim/{kind.format("t")}.py')
    for size, arch in dict(s='small', b='base').items():
        cfg = load(f'hier_vim/{kind.format(size)}.py')
        assert cfg.model.backbone.arch == arch
        cfg.model.backbone.update(arch='tiny', drop_path_rate=tiny.model.backbone.drop_path_rate)
        if size == 'b':
            for part in ('neck', 'head', 'decode_head', 'auxiliary_head'):
                if (cfg.model.get(part) or {}).get('in_channels'):
                    cfg.model[part].in_channels = tiny.model[part].in_channels
        assert cfg.to_dict() == tiny.to_dict()


def test_the_largest_score_of_each_class_over_the_tokens():
    init_default_scope('mmpretrain')
    head = MODELS.build(dict(type='mmvim.TokenMaxClsHead', num_classes=5, in_channels=8))
    tokens = torch.randn(2, 7, 8, requires_grad=True)
    scores = head((tokens,))
    expected = torch.stack([torch.stack([head.fc(token) for token in image]).max(0).values for image in tokens])
    torch.testing.assert_close(scores, expected)
    with pytest.raises(ValueError, match=r"needs tokens \(B, L, D\), got \(2, 8\): set out_type='raw'"):
        head((torch.randn(2, 8),))
