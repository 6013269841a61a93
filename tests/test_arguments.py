"""Every argument of every public class is refused by name if its value is illegal or contradicts another argument."""

import inspect
import re
from importlib import import_module

import cv2
import numpy as np
import pytest
import torch
from mmengine.config import ConfigDict
from mmengine.optim import build_optim_wrapper
from mmengine.registry import init_default_scope

from mmvim import registry

ALONE = None  # no other argument bears on it
HOSTS = None  # the host's argument, handed on: the host checks it when it uses it

BACKBONE = dict(
    in_channels=(0, ALONE),
    drop_path_rate=(1.0, ALONE),
    with_cp=('no', ALONE),
    init_cfg=(3, ALONE),
)
PLAIN = dict(embed_dims=16, depth=4)
HIER = dict(embed_dims=16, depths=(1, 1, 2, 1))
MAMBA = dict(embed_dims=16, stem_channels=8, depths=(1, 1, 3, 2), num_heads=(1, 2, 4, 8))
VIT = dict(PLAIN, num_heads=2)
WINDOWS = dict(with_cls_token=False, out_type='featmap', window_size=3)
BOXES = dict(type='Shared2FCBBoxHead', in_channels=8, fc_out_channels=8, roi_feat_size=7)
EXTRACTOR = dict(
    type='SingleRoIExtractor', roi_layer=dict(type='RoIAlign', output_size=7), out_channels=8, featmap_strides=[4]
)
MASKS = dict(type='FCNMaskHead', in_channels=8, conv_out_channels=8)
STAGE = dict(
    assigner=dict(type='MaxIoUAssigner', pos_iou_thr=0.5, neg_iou_thr=0.5),
    sampler=dict(type='RandomSampler', num=8, pos_fraction=0.5),
)

# class -> arguments that build it, and for each argument an illegal value and what contradicts another one, as the
# arguments that are given in its place.
ROWS = {
    'VisionMamba': (
        dict(arch=PLAIN, img_size=32),
        dict(
            BACKBONE,
            arch=('huge', dict(arch=dict(PLAIN, depth=3), directions='block')),
            img_size=(0, ALONE),
            patch_size=(0, ALONE),
            patch_stride=(0, ALONE),
            out_indices=(9, dict(out_indices=1, final_norm=True)),
            out_type=('map', dict(out_type='cls_token', cls_token=None)),
            cls_token=('tail', dict(cls_token=None)),
            directions=('v3', dict(directions='block', out_indices=0, out_type='featmap')),
            divide_output=('no', dict(divide_output=False, directions='v1')),
            reverse_prob=(7, dict(reverse_prob=0.5)),
            rotary=('all', dict(rotary='both', arch=dict(PLAIN, embed_dims=18))),
            rotary_pretrain_size=(0, dict(rotary_pretrain_size=14)),
            layer_scale_init=('x', ALONE),
            feature_source=('x', ALONE),
            final_norm=('no', dict(final_norm=True, out_indices=0, out_type='featmap')),
            drop_rate=('x', ALONE),
            norm_eps=(0, ALONE),
            frozen_stages=(-2, dict(frozen_stages=5)),
            interpolate_mode=('cubic', ALONE),
            scan_backend=('cuda', ALONE),
        ),
    ),
    'VisionTransformer': (
        dict(arch=VIT, img_size=32),
        dict(
            BACKBONE,
            arch=('huge', dict(arch=dict(VIT, num_heads=3))),
            img_size=('x', ALONE),
            patch_size=(0, ALONE),
            out_indices=(9, dict(out_indices=1, final_norm=True)),
            out_type=('map', dict(out_type='cls_token', with_cls_token=False)),
            with_cls_token=('no', dict(WINDOWS, with_cls_token=True)),
            window_size=(-1, dict(window_size=3)),
            global_attn_indexes=('x', dict(global_attn_indexes=(1,))),
            attention=('flash', ALONE),
            final_norm=('no', dict(final_norm=True, out_indices=0, out_type='featmap')),
            drop_rate=(-0.1, ALONE),
            norm_eps=('x', ALONE),
            frozen_stages=('x', dict(frozen_stages=5)),
            interpolate_mode=(None, ALONE),
        ),
    ),
    'HierVim': (
        dict(arch=HIER),
        dict(
            BACKBONE,
            arch=('huge', ALONE),
            patch_size=(0, ALONE),
            out_indices=(4, dict(out_indices=0, out_type='avg_featmap')),
            out_type=('map', dict(out_type='avg_featmap', out_indices=(0, 3))),
            directions=('block', dict(directions='none', divide_output=False)),
            divide_output=('no', dict(divide_output=False, directions='v1')),
            frozen_stages=(5, ALONE),
            scan_backend=('cuda', ALONE),
        ),
    ),
    'MambaVision': (
        dict(arch=MAMBA, window_sizes=(8, 8, 4, 2)),
        dict(
            BACKBONE,
            arch=('huge', dict(arch=dict(MAMBA, num_heads=(3, 2, 4, 8)))),
            out_indices=(4, dict(out_indices=0, out_type='avg_featmap')),
            out_type=('map', dict(out_type='avg_featmap', out_indices=(0, 3))),
            window_sizes=((8, 8), ALONE),
            fit_windows=('no', ALONE),
            attention=('first', dict(attention=50)),
            mixer_conv=('x', ALONE),
            mixer_symmetric=('no', ALONE),
            mixer_merge=('x', ALONE),
            dt_init=('x', ALONE),
            frozen_stages=(5, ALONE),
            norm_eval=('no', ALONE),
            scan_backend=('cuda', ALONE),
        ),
    ),
    'LN2d': (dict(num_channels=8), dict(num_channels=(0, ALONE), eps=('x', ALONE), kwargs=(dict(foo=1), ALONE))),
    'SimpleFPN': (
        dict(in_channels=16, out_channels=8),
        dict(
            in_channels=(0, ALONE),
            out_channels=('x', ALONE),
            scales=((3.0,), dict(scales=(1.0, 2.0))),
            num_outs=(0, dict(num_outs=3)),
            in_stride=(12, dict(in_stride=2)),
            norm_cfg=('BN', ALONE),
            init_cfg=(3, ALONE),
        ),
    ),
    'CascadeRoIHead': (
        dict(bbox_roi_extractor=EXTRACTOR, bbox_head=BOXES, num_classes=4, test_cfg=None),
        dict(
            bbox_roi_extractor=(3, dict(bbox_roi_extractor=[EXTRACTOR], num_stages=3)),
            bbox_head=([], dict(bbox_head=[BOXES] * 2, num_stages=3)),
            num_classes=(0, dict(num_classes=3, mask_head=dict(MASKS, num_classes=4))),
            mask_roi_extractor=([EXTRACTOR], ALONE),
            mask_head=([MASKS] * 3, dict(mask_head=dict(MASKS, num_classes=3))),
            num_stages=(0, dict(num_stages=2, iou_thresholds=(0.5, 0.6, 0.7))),
            iou_thresholds=((0, 0.5, 0.6), dict(iou_thresholds=(0.6, 0.7), train_cfg=[STAGE] * 2)),
            stage_loss_weights=((-1, 1, 1), dict(stage_loss_weights=(1, 1), num_stages=3)),
            scale_gradient=('no', ALONE),
            resample=('no', dict(resample=False, train_cfg=[STAGE] * 3)),
            train_cfg=(dict(sampler=STAGE['sampler']), dict(train_cfg=[STAGE] * 2, num_stages=3)),
            kwargs=(dict(shared_head=dict(type='x')), ALONE),
        ),
    ),
    'CocoFolderDataset': (
        dict(ann_file='a.json', data_prefix=dict(img='images')),
        dict(
            ann_file=(3, dict(ann_file='')),
            data_root=(3, dict(data_root='gone')),
            data_prefix=('images', ALONE),
            metainfo=(('a', 'b'), dict(metainfo=dict(classes=('other',)))),
            skip_bad_images=('no', ALONE),
            images_outside=('no', ALONE),
            kwargs=(dict(foo=1), ALONE),
        ),
    ),
    'ClassFolderDataset': (
        dict(data_root='classes'),
        dict(
            data_root=('gone', dict(data_root='')),
            data_prefix=('gone', ALONE),
            metainfo=(dict(classes=('cat', 'cat')), dict(metainfo=dict(classes=('dog',)))),
            only_classes=('no', ALONE),
            skip_bad_images=('no', ALONE),
            extensions=(('.tif',), ALONE),
            kwargs=(dict(foo=1), dict(ann_file='a.txt')),
        ),
    ),
    'ShapesDataset': (
        dict(data_root='shapes'),
        dict(
            split=('test', ALONE),
            data_root=('images', ALONE),
            shapes=(dict(num_train=0), dict(shapes=dict(seed=5))),
            kwargs=(dict(foo=1), dict(ann_file='a.json')),
        ),
    ),
    'LoadImageFromFile': (
        {},
        dict(
            to_float32=('no', ALONE),
            color_type=('grey', ALONE),
            imdecode_backend=('x', ALONE),
            backend_args=HOSTS,
            value_range=((1, 0), ALONE),
        ),
    ),
    'FiniteHook': ({}, dict(allowed=(-1, ALONE))),
    'LabelMapHook': ({}, {}),
    'TimeSplitHook': ({}, dict(warmup=('x', ALONE))),
    'AmpOptimWrapper': (
        {},
        dict(
            dtype=('float8', ALONE),
            loss_scale=('x', dict(loss_scale=8.0, dtype='bfloat16')),
            parts=('backbone', ALONE),
            kwargs=(dict(foo=1), ALONE),
        ),
    ),
    'LayerDecayOptimWrapperConstructor': ({}, dict(optim_wrapper_cfg=(3, ALONE), paramwise_cfg=HOSTS)),
    'CocoFolderMetric': ({}, dict(kwargs=(dict(ann_file='a.json'), ALONE))),
    'EnlargingDetVisualizer': (
        {},
        dict(
            name=HOSTS,
            min_side=(0, dict(min_side=500, max_side=400)),
            max_side=('x', dict(max_side=100)),
            alpha=(2, ALONE),
            line_width=(0, ALONE),
            kwargs=(dict(foo=1), ALONE),
        ),
    ),
}
ROWS['ShapesSegDataset'] = (ROWS['ShapesDataset'][0], dict(ROWS['ShapesDataset'][1], kwargs=(dict(foo=1), ALONE)))
# the names by which a message may call an argument
ALSO = dict(
    kwargs=r'foo|shared_head|ann_file',
    shapes='num_train|seed|settings',
    data_root=r'data_root|data folder|images',
    ann_file='ann_file|annotation file',
    data_prefix='data_prefix|image folder',
    metainfo='metainfo|classes',
    optim_wrapper_cfg='optim_wrapper_cfg|optimizer_cfg',
    cls_token='class token|cls_token',
    with_cls_token='class token|with_cls_token',
    out_type='out_type',
    window_size='window',
    arch='arch|depth',
    rotary='rotary',
    num_outs='num_outs',
)


def public_classes():
    """Every class of mmvim that a registry has, and that has arguments of its own, by name."""
    for module in ('models', 'datasets', 'engine', *registry.HOST_PARTS.values()):
        import_module(module if '.' in module else f'mmvim.{module}')
    found = {}
    for child in vars(registry).values():
        if isinstance(child, registry.Registry) and child.scope == registry.SCOPE:
            child.import_from_location()
            found.update({name: cls for name, cls in child.module_dict.items() if cls.__module__.startswith('mmvim.')})
    return {name: cls for name, cls in found.items() if '__init__' in vars(cls)}


CLASSES = public_classes()


def own_arguments(cls):
    return {name for name in inspect.signature(cls.__init__).parameters if name != 'self'}


@pytest.fixture
def build(tmp_path, monkeypatch):
    """Function (name of a class, changes) that builds it as its row says with these changes."""
    monkeypatch.chdir(tmp_path)
    (tmp_path / 'images').mkdir()
    (tmp_path / 'images' / 'x.txt').write_text('')
    for kind in ('cat', 'dog'):
        (tmp_path / 'classes' / kind).mkdir(parents=True)
        cv2.imwrite(str(tmp_path / 'classes' / kind / 'x.png'), np.zeros((8, 8, 3), np.uint8))
    categories, images = [dict(id=1, name='a')], [dict(id=1, file_name='x.txt', height=2, width=2)]
    annotations = [dict(id=1, image_id=1, category_id=1, bbox=[0, 0, 2, 2], segmentation=[[0, 0, 2, 0, 2, 2]])]
    content = dict(images=images, annotations=annotations, categories=categories)
    (tmp_path / 'a.json').write_text(str(content).replace("'", '"'))

    def run(name, changes):
        init_default_scope('mmseg' if name == 'ShapesSegDataset' else 'mmdet')
        kwargs = {**ROWS[name][0], **changes}
        if name == 'AmpOptimWrapper':
            kwargs['optimizer'] = torch.optim.SGD([torch.nn.Parameter(torch.zeros(1))], lr=0.1)
        elif name == 'LayerDecayOptimWrapperConstructor':
            kwargs = {'optim_wrapper_cfg': dict(optimizer=dict(type='SGD', lr=0.1)), **kwargs}
        elif name == 'CascadeRoIHead':
            kwargs = {key: ConfigDict(a=value).a for key, value in kwargs.items()}
        elif name in ('ShapesDataset', 'ShapesSegDataset'):
            CLASSES[name](data_root='shapes', shapes=dict(num_train=1, num_val=1))
            kwargs.setdefault('shapes', dict(num_train=1, num_val=1))
        built = CLASSES[name](**kwargs)
        if 'init_cfg' in changes:
            built.init_weights()
        return built

    return run


def test_every_argument_has_a_row():
    assert set(ROWS) == set(CLASSES)
    for name, (_, rows) in ROWS.items():
        assert set(rows) == own_arguments(CLASSES[name]), name


@pytest.mark.parametrize('name', sorted(ROWS))
def test_the_arguments_of_a_row_build(build, name):
    build(name, {})


def changes_of(argument, value):
    return value if argument == 'kwargs' else {argument: value}


ILLEGAL = [(n, a, changes_of(a, row[0])) for n, (_, rows) in ROWS.items() for a, row in rows.items() if row]
AGAINST = [(n, a, row[1]) for n, (_, rows) in ROWS.items() for a, row in rows.items() if row and row[1] is not None]


@pytest.mark.parametrize(
    'name, argument, changes', [*ILLEGAL, *AGAINST], ids=lambda value: value if isinstance(value, str) else ''
)
def test_it_is_refused_by_name(build, name, argument, changes):
    if name == 'AmpOptimWrapper' and argument == 'loss_scale' and 'dtype' not in changes:
        changes = dict(changes, dtype='float16')
    if argument == 'reverse_prob' and changes['reverse_prob'] == 7:
        changes = dict(changes, directions='sequence')
    if argument == 'rotary_pretrain_size' and not changes[argument]:
        changes = dict(changes, rotary='both')
    with pytest.raises((ValueError, TypeError, FileExistsError)) as refused:
        build(name, changes)
    text = str(refused.value)
    assert re.search(ALSO.get(argument, argument), text), text
    assert '\n' not in text.strip() or argument in ('kwargs', 'init_cfg', 'optim_wrapper_cfg'), text


@pytest.mark.parametrize(
    'paramwise, named',
    [
        (dict(decay_rate='x'), 'decay_rate'),
        (dict(decay_rate=1.1), 'decay_rate'),
        (dict(decay_rate=0.5, decay_scope='x'), 'decay_scope'),
        (dict(no_decay='all'), 'no_decay'),
        (dict(decay_scope='embedding'), 'decay_scope'),
        (dict(norm_decay_mult='x'), 'norm_decay_mult'),
        (dict(bias_decay_mult=-1), 'bias_decay_mult'),
        (dict(flat_decay_mult=True), 'flat_decay_mult'),
        (dict(custom_keys=['a']), 'custom_keys'),
        (dict(custom_keys=dict(a=3)), 'custom_keys'),
        (dict(custom_keys=dict(nothing=dict(lr_mult=2))), 'custom_keys'),
        (dict(decay=3), 'decay'),
    ],
)
def test_keys_of_paramwise_cfg_are_refused_by_name(paramwise, named):
    cfg = dict(
        optimizer=dict(type='SGD', lr=0.1),
        constructor='mmvim.LayerDecayOptimWrapperConstructor',
        paramwise_cfg=paramwise,
    )
    with pytest.raises(ValueError, match=named):
        build_optim_wrapper(torch.nn.Linear(2, 2), cfg)


def test_the_keys_of_paramwise_cfg_are_those():
    from mmvim.engine.layer_decay import KEYS

    rows = {
        'decay_rate', 'decay_scope', 'no_decay', 'norm_decay_mult', 'bias_decay_mult', 'flat_decay_mult', 'custom_keys',
    }  # fmt: skip
    assert rows == KEYS
