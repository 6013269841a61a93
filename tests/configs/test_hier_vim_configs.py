"""The Hier-Vim and ablation configs differ where they say."""

import pytest
import torch
import torch.nn.functional as F
from config_runs import NAMES, reduced, samples
from mmengine.registry import MODELS, init_default_scope

HIER_VIM = [name for name in NAMES if name.startswith('hier_vim/')]
ABLATIONS = [name for name in NAMES if name.startswith('vim_ablations/')]
STRATEGIES = dict(none='none', sequence='sequence', block='block', ssm='v1')
CLASSIFICATION = dict(
    mean=dict(cls_token=None, out_type='avg_featmap'),
    max=dict(cls_token=None, out_type='raw'),
    head=dict(cls_token='head'),
    double=dict(cls_token='double'),
)
IMAGENET = 'vim_ablations/vim-ti-{}_8xb128_in1k.py'
SEGMENTER = 'vim_ablations/segmenter_vim-ti{}_8xb2-160k_ade20k-512x512.py'


def test_all_that_was_promised_is_there():
    names = [f'hier-vim-{size}_16xb64_in1k.py' for size in 'tsb']
    names += [f'mask-rcnn_hier-vim-{size}_fpn_1x_coco.py' for size in 'tsb']
    names += ['mask-rcnn_hier-vim-t_fpn_folder.py', 'upernet_hier-vim-t_folder.py']
    names += [f'upernet_hier-vim-{size}_8xb2-160k_ade20k-512x512.py' for size in 'tsb']
    assert HIER_VIM == sorted(f'hier_vim/{name}' for name in names)
    names = [IMAGENET.format(name) for name in (*STRATEGIES, *(f'cls-{design}' for design in CLASSIFICATION))]
    names += [SEGMENTER.format(f'-{name}') for name in STRATEGIES] + [SEGMENTER.format('')]
    assert ABLATIONS == sorted(names)


@pytest.mark.parametrize('name', [SEGMENTER.format(''), 'hier_vim/upernet_hier-vim-t_8xb2-160k_ade20k-512x512.py'])
def test_segmentation_of_images_smaller_than_the_crop_and_of_odd_sides(load, name):
    cfg = load(name)
    model = MODELS.build(reduced(cfg, (64, 64))).eval()
    for size in ((37, 45), (81, 33)):
        with torch.no_grad():
            (predicted,) = model.test_step(samples('mmseg', [size]))
        assert predicted.pred_sem_seg.data.shape == (1, *size)


@pytest.mark.parametrize('size', 'tsb')
def test_the_batch_of_a_learning_rate_is_known(load, size):
    for name in (f'upernet_hier-vim-{size}_8xb2-160k_ade20k-512x512', f'mask-rcnn_hier-vim-{size}_fpn_1x_coco'):
        assert load(f'hier_vim/{name}.py').auto_scale_lr.base_batch_size == 16


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
