"""Every config of the project builds, and its numbers fit each other."""

import resource
from pathlib import Path

import pytest
import torch
from mmdet.registry import MODELS
from mmengine.config import Config
from mmengine.optim import build_optim_wrapper
from mmengine.registry import PARAM_SCHEDULERS, init_default_scope

CONFIGS = Path(__file__).parent.parent.parent / 'configs'
NAMES = sorted(str(path.relative_to(CONFIGS)) for path in CONFIGS.rglob('*.py') if '_base_' not in path.parts)
DETECTION = [name for name in NAMES if 'cascade_mask_rcnn' in name and not name.startswith('deit')]
VIM = [name for name in DETECTION if name.startswith('vim/')]


def test_the_list_is_not_empty():
    assert len(VIM) >= 4 and 'demo/cascade_mask_rcnn_vim_ti_shapes.py' in NAMES


@pytest.fixture
def build(load_config, tmp_path):
    (tmp_path / 'a.json').write_text('{"images": [], "annotations": [], "categories": [{"id": 1, "name": "a"}]}')
    init_default_scope('mmdet')

    def load(name):
        keys = dict(data_root=str(tmp_path), train_ann='a.json', val_ann='a.json') if 'folder' in name else {}
        cfg = load_config(name, **keys)
        return cfg, MODELS.build(cfg.model)

    return load


@pytest.mark.parametrize('name', DETECTION)
def test_models_build_and_all_parts_fit(build, name):
    cfg, model = build(name)
    width = cfg.model.neck.in_channels
    assert model.backbone.out_channels[-1] == width
    strides = [s for s, _ in model.rpn_head.prior_generator.strides]
    patch = model.backbone.out_strides[-1]
    scales = cfg.model.neck.get('scales', (4, 2, 1, 0.5))
    assert strides[: len(scales)] == [int(patch / scale) for scale in scales]
    assert len(strides) == cfg.model.neck.num_outs
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


def rates(cfg, model):
    names = {id(p): n for n, p in model.named_parameters()}
    groups = build_optim_wrapper(model, cfg.optim_wrapper).optimizer.param_groups
    return {names[id(p)]: (g['lr'], g['weight_decay']) for g in groups for p in g['params']}


def test_the_released_recipe(build):
    cfg, model = build('vim/cascade_mask_rcnn_vim_ti_coco.py')
    assert (model.backbone.embed_dims, model.backbone.depth, len(model.backbone.layers)) == (192, 24, 24)
    assert model.backbone.grid == (64, 64) and model.backbone.pos_embed.shape == (1, 4096, 192)
    assert model.backbone.rotary_mode == 'both' and model.backbone.feature_source == 'residual'
    assert model.backbone.layers[-1].drop_path.drop_prob == pytest.approx(0.1 * 22 / 23)
    assert cfg.train_cfg.max_iters == 184375 and cfg.param_scheduler[1].milestones == [163889, 177546]
    assert cfg.param_scheduler[0].end == 250
    assert cfg.auto_scale_lr.base_batch_size == 64 == 8 * cfg.train_dataloader.batch_size
    found = rates(cfg, model)
    assert found['roi_head.bbox_head.0.fc_cls.weight'] == pytest.approx((1e-4, 0.1))
    assert found['backbone.layers.23.mixer.in_proj.weight'][0] == pytest.approx(1e-4 * 0.837)
    assert found['backbone.layers.0.mixer.in_proj.weight'][0] == pytest.approx(1e-4 * 0.837**24)
    assert found['backbone.pos_embed'] == pytest.approx((1e-4 * 0.837**25, 0))
    assert found['backbone.layers.3.mixer.A_log'][1] == 0
    heads = model.roi_head.bbox_head
    assert len(heads) == 3 and all(len(h.shared_convs) == 4 and len(h.shared_fcs) == 1 for h in heads)
    assert all(type(c.norm).__name__ == 'LayerNorm2d' for h in heads for c in h.shared_convs)
    assert len(model.rpn_head.rpn_conv) == 2
    train, test = cfg.train_dataloader.dataset.pipeline, cfg.test_dataloader.dataset.pipeline
    assert train[2].ratio_range == (0.1, 2.0) and train[3].crop_size == train[2].scale == (1024, 1024)
    assert min(test[1].scale) == 1024


def test_the_schedule_of_the_paper_falls_linearly_to_zero(build):
    cfg, model = build('vim/cascade_mask_rcnn_vim_ti_380k_coco.py')
    assert cfg.train_cfg.max_iters == 380000
    assert {rate for rate, _ in rates(cfg, model).values()} == {1e-4}
    warmup, decay = cfg.param_scheduler
    assert (decay.begin, decay.end, decay.start_factor, decay.end_factor) == (warmup.end, 380000, 1, 0)


def test_the_small_model_differs_only_in_size():
    tiny, small = (Config.fromfile(CONFIGS / 'vim' / f'cascade_mask_rcnn_vim_{s}_coco.py') for s in ('ti', 's'))
    assert small.model.backbone.arch == 'small' and small.model.neck.in_channels == 384
    small.model.backbone.arch, small.model.neck.in_channels = tiny.model.backbone.arch, tiny.model.neck.in_channels
    assert small.to_dict() == tiny.to_dict()


def test_a_dumped_config_is_the_same(tmp_path):
    cfg = Config.fromfile(CONFIGS / 'vim' / 'cascade_mask_rcnn_vim_ti_coco_folder.py')
    cfg.dump(tmp_path / 'dumped.py')
    assert Config.fromfile(tmp_path / 'dumped.py').to_dict() == cfg.to_dict()


@pytest.mark.slow
def test_one_training_step_and_one_prediction_at_full_size(build):
    from mmcv.cnn.bricks import DropPath
    from mmdet.structures import DetDataSample
    from mmdet.structures.mask import BitmapMasks
    from mmengine.structures import InstanceData

    cfg, model = build('vim/cascade_mask_rcnn_vim_ti_coco.py')
    model.init_weights()
    for module in model.modules():
        if isinstance(module, DropPath):
            module.drop_prob = 0.0  # else whole blocks may get no gradient from the only image
    size = 1024
    sample = DetDataSample(metainfo=dict(img_shape=(size, size), ori_shape=(size, size), scale_factor=(1.0, 1.0)))
    masks = torch.zeros(1, size, size, dtype=torch.uint8)
    masks[0, 100:500, 200:700] = 1
    sample.gt_instances = InstanceData(
        bboxes=torch.tensor([[200.0, 100, 700, 500]]),
        labels=torch.tensor([17]),
        masks=BitmapMasks(masks.numpy(), size, size),
    )
    image = torch.randint(0, 256, (3, size, size), dtype=torch.uint8)
    wrapper = build_optim_wrapper(model, cfg.optim_wrapper)
    before = {name: p.detach().clone() for name, p in model.named_parameters()}
    log = model.train().train_step(dict(inputs=[image], data_samples=[sample]), wrapper)
    assert torch.isfinite(log['loss'])
    unchanged = [name for name, p in model.named_parameters() if torch.equal(p, before[name])]
    assert not [name for name in unchanged if name.startswith(('backbone.layers', 'neck', 'rpn_head'))]
    with torch.no_grad():
        predicted = model.eval().test_step(dict(inputs=[image], data_samples=[sample]))[0].pred_instances
    assert predicted.masks.shape == (len(predicted.bboxes), size, size)
    print(f'peak resident memory {resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 2**20:.1f} GiB')
