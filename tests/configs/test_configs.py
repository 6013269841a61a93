"""Every config of the project builds, trains and predicts at a reduced size, and its numbers fit each other."""

import re
import resource
from importlib import import_module
from pathlib import Path

import numpy as np
import pytest
import torch
import yaml
from config_runs import CONFIGS, FILES, FORMER, NAMES, rates, reduced, samples, train_and_predict
from mmengine.config import Config
from mmengine.optim import build_optim_wrapper
from mmengine.registry import MODELS, PARAM_SCHEDULERS, TRANSFORMS, init_default_scope

from mmvim.models import HierVim, MambaVision, VisionMamba, VisionTransformer

FAMILIES = dict(
    vim=VisionMamba, vim_ablations=VisionMamba, deit=VisionTransformer, hier_vim=HierVim, mambavision=MambaVision
)
CONTROL = 'mambavision/upernet_r18_camvid-240x180.py'
DETECTION = [name for name in NAMES if 'cascade_mask_rcnn' in name and not name.startswith('deit')]
VIM = [name for name in DETECTION if name.startswith('vim/')]
# Recipes of the released code of Vim, with their baseline and ablations.
RELEASED = [
    name
    for name in NAMES
    if name.startswith(('vim/', 'deit/', 'vim_ablations/')) and 'folder' not in name and 'camvid' not in name
]


def test_the_list_is_not_empty():
    assert len(VIM) >= 4 and 'demo/cascade_mask_rcnn_vim_ti_shapes.py' in NAMES
    assert {name.partition('/')[0] for name in NAMES} == {*FAMILIES, 'demo'}


@pytest.mark.parametrize('folder', [*FAMILIES, 'demo'])
def test_metafile_and_notes_list_every_config(folder):
    names = [name for name in NAMES if name.startswith(f'{folder}/')]
    listed = yaml.safe_load((CONFIGS / folder / 'metafile.yml').read_text())['Models']
    assert sorted(model['Config'] for model in listed) == [f'configs/{name}' for name in names]
    assert all(model['Config'] == f'configs/{folder}/{model["Name"]}.py' for model in listed)
    facts = [value for model in listed for value in model['Metadata'].items() if 'published' in value[0]]
    assert all(isinstance(number, float) for _, number in facts), facts  # YAML takes 1e6 for a word, and 1.0e+6 not
    notes = (CONFIGS / folder / 'README.md').read_text()
    former = {new: old for old, new in FORMER.items()}
    assert not [n for n in names if not any(Path(x).name in notes for x in (n, former.get(n, n)))]


@pytest.mark.parametrize('former, name', FORMER.items())
def test_former_names_work(former, name):
    assert former in FILES and name in NAMES
    assert Config.fromfile(CONFIGS / former).to_dict() == Config.fromfile(CONFIGS / name).to_dict()


@pytest.fixture
def build(load):
    def build(name):
        cfg = load(name)
        with torch.device('meta'):
            return cfg, MODELS.build(cfg.model)

    return build


@pytest.mark.parametrize('name', NAMES)
def test_a_config_is_complete_as_a_file(load, name):
    """Its model builds by its host's own means, without the runner that replaces what follows from the data."""
    cfg = Config.fromfile(CONFIGS / name)
    if cfg.model != load(name).model:  # if nothing was replaced, the next test builds the same
        build_by_host(cfg, name)


def build_by_host(cfg, name):
    init_default_scope(cfg.default_scope)
    host = import_module(f'{cfg.default_scope}.models')  # not first under torch.device('meta')
    with torch.device('cpu' if 'segmenter' in name else 'meta'):  # that head reads numbers from tensors
        model = import_module(f'{cfg.default_scope}.registry').MODELS.build(cfg.model)
    assert type(model).__module__.startswith(host.__name__)
    return model


@pytest.mark.parametrize('name', NAMES)
def test_full_size_models_build_and_all_parts_fit(load, name):
    cfg = load(name)
    model = build_by_host(cfg, name)
    family = FAMILIES.get(name.partition('/')[0])
    assert (family is None or isinstance(model.backbone, family)) != (name == CONTROL)
    if name != CONTROL:
        check_that_parts_fit(cfg.model, model)
    groups = build_optim_wrapper(model, cfg.optim_wrapper).optimizer.param_groups
    assert sum(len(group['params']) for group in groups) == sum(p.requires_grad for p in model.parameters())
    no_decay = cfg.optim_wrapper.get('paramwise_cfg', {}).get('no_decay', 'declared')
    assert (no_decay != 'declared') == (name in RELEASED)
    if name != CONTROL and no_decay == 'declared':
        decayed = {id(p) for group in groups for p in group['params'] if group['weight_decay']}
        names = dict(model.backbone.named_parameters())
        assert not [name for name in model.backbone.no_weight_decay() if id(names[name]) in decayed]


def check_that_parts_fit(cfg, model):
    """Neck and heads take the channels and strides that the backbone has."""
    channels, strides = model.backbone.out_channels, model.backbone.out_strides
    if 'roi_head' in cfg:
        levels = [stride for stride, _ in model.rpn_head.prior_generator.strides]
        if isinstance(cfg.neck.in_channels, int):
            assert channels == (cfg.neck.in_channels,)
            scales = cfg.neck.get('scales', (4, 2, 1, 0.5))
            assert levels[: len(scales)] == [int(strides[0] / scale) for scale in scales]
        else:
            assert (channels, strides) == (tuple(cfg.neck.in_channels), tuple(levels[:4]))
        assert len(levels) == cfg.neck.num_outs
    elif 'decode_head' not in cfg:
        assert channels == (cfg.head.in_channels,)
    elif 'auxiliary_head' not in cfg:
        assert channels == (cfg.decode_head.in_channels,)
        assert len(model.decode_head.layers) == 2 and model.backbone.final_norm
    else:
        assert channels == tuple(cfg.decode_head.in_channels)
        assert channels[cfg.auxiliary_head.in_index] == cfg.auxiliary_head.in_channels
        if 'neck' in cfg:
            assert channels == (cfg.neck.embed_dim,) * 4


@pytest.mark.parametrize('name', NAMES)
def test_one_training_step_and_one_prediction_at_a_reduced_size(load, name):
    """On images that are no multiples of the patch, of two sizes where hosts pad; UperNet slides a larger crop."""
    torch.manual_seed(0)
    cfg = load(name)
    sizes = [(60, 70)] * 2 if cfg.default_scope == 'mmpretrain' else [(90, 70), (60, 70)]
    model = MODELS.build(reduced(cfg, sizes[0]))
    if name != CONTROL:  # whose residual blocks start from zero
        model.backbone.init_weights()  # a class token of zeros passes nothing on
    for module in model.modules():
        if getattr(module, 'layer_scale', None):
            torch.nn.init.ones_(module.gamma_1)
            torch.nn.init.ones_(module.gamma_2)
    stayed = [name for name in train_and_predict(cfg, model, sizes) if name.startswith('backbone')]
    assert not stayed


@pytest.mark.parametrize('name', DETECTION)
def test_regions_are_taken_from_the_levels_of_the_proposals(build, name):
    _, model = build(name)
    strides = [stride for stride, _ in model.rpn_head.prior_generator.strides]
    for extractor in (*model.roi_head.bbox_roi_extractor, *model.roi_head.mask_roi_extractor):
        assert list(extractor.featmap_strides) == strides[: len(extractor.featmap_strides)]


@pytest.mark.parametrize('name', DETECTION)
def test_optimisers_and_schedules_build(build, name):
    cfg, model = build(name)
    wrapper = build_optim_wrapper(model, cfg.optim_wrapper)
    groups = wrapper.optimizer.param_groups
    assert sum(len(g['params']) for g in groups) == sum(p.requires_grad for p in model.parameters())
    assert cfg.param_scheduler[-1].get('end', cfg.train_cfg.max_iters) == cfg.train_cfg.max_iters
    for schedule in cfg.param_scheduler:
        PARAM_SCHEDULERS.build({**schedule, 'optimizer': wrapper})


def test_the_released_recipe(build):
    cfg, model = build('vim/cascade_mask_rcnn_vim_ti_coco.py')
    assert (model.backbone.embed_dims, model.backbone.depth, len(model.backbone.layers)) == (192, 24, 24)
    assert model.backbone.grid == (64, 64) and model.backbone.pos_embed.shape == (1, 4096, 192)
    assert model.backbone.rotary_mode == 'both' and model.backbone.feature_source == 'residual'
    assert model.backbone.layers[-1].drop_path.drop_prob == pytest.approx(0.1 * 22 / 23)
    assert cfg.train_cfg.max_iters == 184375 and cfg.param_scheduler[1].milestones == [163889, 177546]
    assert cfg.param_scheduler[0].end == 250
    assert cfg.auto_scale_lr.base_batch_size == 64 == 8 * cfg.train_dataloader.batch_size
    found = rates(cfg)
    assert found['roi_head.bbox_head.0.fc_cls.weight'] == pytest.approx((1e-4, 0.1))
    assert found['backbone.layers.23.mixer.in_proj.weight'][0] == pytest.approx(1e-4 * 0.837)
    assert found['backbone.layers.0.mixer.in_proj.weight'][0] == pytest.approx(1e-4 * 0.837**24)
    assert found['backbone.pos_embed'] == pytest.approx((1e-4 * 0.837**25, 0))
    heads = model.roi_head.bbox_head
    assert len(heads) == 3 and all(len(h.shared_convs) == 4 and len(h.shared_fcs) == 1 for h in heads)
    assert all(type(c.norm).__name__ == 'LayerNorm2d' for h in heads for c in h.shared_convs)
    assert len(model.rpn_head.rpn_conv) == 2
    train, test = cfg.train_dataloader.dataset.pipeline, cfg.test_dataloader.dataset.pipeline
    assert train[2].ratio_range == (0.1, 2.0) and train[3].crop_size == train[2].scale == (1024, 1024)
    assert test[1].scale == (1024, 1024) and test[1].keep_ratio


# Parameters of each kind, as patterns of their names.
KINDS = dict(
    positions=r'backbone\.pos_embed',
    class_tokens=r'backbone\.cls_token(_head|_tail)?',
    A=r'.*\.(A_log|A_b_log)',
    D=r'.*\.(D|D_b)',
    backbone_norms=r'backbone\..*norm(1|2|_f)?\.(weight|bias)',
    head_norms=r'(?!backbone\.).*(norm|bn|ln)\.(weight|bias)',
    biases=r'(?!.*(norm\d?|bn|ln)\.bias).*\.bias',
    weights=r'.*(proj|conv1d|qkv|fc1|fc_cls|fc_reg|conv_seg|head\.fc)\.weight',
)


def exempt(name):
    """Kinds of parameters without weight decay in the released recipe: its optimiser's rules, read from its code."""
    if 'rcnn' in name:  # detectron2: all but pos_embed and PyTorch's own norms, and RMSNorm is Mamba's
        return {'positions', 'backbone_norms'} if name.startswith('deit') else {'positions'}
    flat = {'D', 'biases', 'backbone_norms', 'head_norms'}
    if 'in1k' in name:  # timm 0.4.12
        return {'positions', 'class_tokens', *flat}
    return flat  # BEiT's constructor, which looks for the names 'pos_embed' and 'cls_token' without 'backbone.'


@pytest.mark.parametrize('name', [name for name in RELEASED if 'segmenter' not in name])
def test_weight_decay_is_the_released_one(load, name):
    cfg = load(name)
    found = {}
    for parameter, (_, decay) in rates(cfg).items():
        for kind, pattern in KINDS.items():
            if re.fullmatch(pattern, parameter):
                found.setdefault(kind, set()).add(decay)
    wanted = cfg.optim_wrapper.optimizer.weight_decay
    assert found == {kind: {0 if kind in exempt(name) else wanted} for kind in found}
    assert ('head_norms' in found) != ('in1k' in name)
    assert {'positions', 'biases', 'backbone_norms', 'weights'} <= set(found)
    assert ('A' in found and 'D' in found) != name.startswith('deit')


# stochastic depth of the released runs
DROP_PATH = {
    'rcnn_vim': 0.1,
    'rcnn_deit': 0.1,
    'upernet_vim': 0.1,
    'upernet_deit': 0.0,
    'stride8': 0.0,
    'vim-ti': 0.0,
    'vim-s_': 0.05,
    'vim-b_': 0.1,  # ours
    'deit-': 0.1,
    'segmenter': 0.0,  # ours
}


@pytest.mark.parametrize('name', RELEASED)
def test_stochastic_depth_is_the_released_one(read, name):
    wanted = next(rate for part, rate in DROP_PATH.items() if part in name)
    assert read(name).model.backbone.get('drop_path_rate', 0.0) == wanted


@pytest.mark.parametrize('name', [name for name in RELEASED if 'rcnn' in name])
def test_detectors_are_tested_in_the_frame_of_training(load, name):
    """Both sides at most 1024, in the corner of a square of zeros behind the normalisation."""
    cfg = load(name)
    preprocessor = MODELS.build(cfg.model.data_preprocessor)
    (resize,) = [step for step in cfg.test_dataloader.dataset.pipeline if 'Resize' in step.type]
    for size in ((480, 640), (640, 480), (20, 3000)):
        image = np.full((*size, 3), 255, np.uint8)
        resized = TRANSFORMS.build(resize)(dict(img=image))
        h, w = resized['img_shape']
        assert max(h, w) == 1024 and h == pytest.approx(max(size[0] * 1024 / max(size), 2), abs=1)
        for training in (True, False):
            data = samples('mmdet', [(h, w), (1024, 1024)])
            data['inputs'][0].fill_(255)
            inputs, found = preprocessor(data, training).values()
            assert inputs.shape == (2, 3, 1024, 1024)
            assert (inputs[0, :, :h, :w] != 0).all() and not inputs[0, :, h:].any() and not inputs[0, :, :, w:].any()
            assert found[0].img_shape == (h, w) and found[0].pad_shape == found[0].batch_input_shape == (1024, 1024)


def test_the_schedule_of_the_paper_falls_linearly_to_zero(build):
    cfg, model = build('vim/cascade_mask_rcnn_vim_ti_380k_coco.py')
    assert cfg.train_cfg.max_iters == 380000
    assert {rate for rate, _ in rates(cfg).values()} == {1e-4}
    warmup, decay = cfg.param_scheduler
    assert (decay.begin, decay.end, decay.start_factor, decay.end_factor) == (warmup.end, 380000, 1, 0)


def test_the_small_model_differs_only_in_size():
    tiny, small = (Config.fromfile(CONFIGS / 'vim' / f'cascade_mask_rcnn_vim_{s}_coco.py') for s in ('ti', 's'))
    assert small.model.backbone.arch == 'small' and small.model.neck.in_channels == 384
    small.model.backbone.arch, small.model.neck.in_channels = tiny.model.backbone.arch, tiny.model.neck.in_channels
    assert small.to_dict() == tiny.to_dict()


def test_a_dumped_config_is_the_same(tmp_path):
    cfg = Config.fromfile(CONFIGS / 'vim' / 'cascade_mask_rcnn_vim_ti_folder.py')
    cfg.dump(tmp_path / 'dumped.py')
    assert Config.fromfile(tmp_path / 'dumped.py').to_dict() == cfg.to_dict()


@pytest.mark.slow  # run by `pytest -m slow`
def test_one_training_step_and_one_prediction_at_full_size(load):
    cfg = load('vim/cascade_mask_rcnn_vim_ti_coco.py')
    model = MODELS.build(cfg.model)
    model.init_weights()
    stayed = train_and_predict(cfg, model, [(1024, 1024)])
    assert not [name for name in stayed if name.startswith(('backbone.layers', 'neck', 'rpn_head'))]
    print(f'peak resident memory {resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 2**20:.1f} GiB')
