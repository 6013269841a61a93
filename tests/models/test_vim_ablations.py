"""Each design of the ablation configs, built from the config itself, gives the original model's logits."""

import pytest
import torch
from mmengine.registry import MODELS, init_default_scope

import mmvim  # noqa: F401

SMALL = dict(arch=dict(embed_dims=64, depth=4), img_size=96)
# case: seed, config; directions were recorded with the class token in the middle, not with the mean of the ablation
CASES = {
    'vim_mean_pool': (13, 'cls-mean', dict()),
    'vim_max_pool': (14, 'cls-max', dict()),
    'vim_head_cls': (11, 'cls-head', dict()),
    'vim_double_cls': (12, 'cls-double', dict()),
    'vim_bidir_none': (16, 'none', dict(cls_token='middle', out_type='cls_token')),
    'vim_bidir_block': (17, 'block', dict(cls_token='middle', out_type='cls_token')),
    'vim_bidir_ssm_v1': (18, 'ssm', dict(cls_token='middle', out_type='cls_token')),
}


def published(name):
    return name.removeprefix('backbone.').replace('head.fc.', 'head.')


@pytest.mark.parametrize('case', CASES)
def test_the_config_gives_the_logits(
    case, load_config, fill_parameters, reference_input, reference_arrays, assert_agrees
):
    seed, name, changes = CASES[case]
    cfg = load_config(f'vim_ablations/vim-ti-{name}_8xb128_in1k.py')
    init_default_scope(cfg.default_scope)
    cfg.model.backbone.update(SMALL, **changes)
    cfg.model.head.update(in_channels=64, num_classes=10)
    cfg.model.train_cfg = None
    model = fill_parameters(MODELS.build(cfg.model), seed, published)
    image = reference_input(seed, 2, 3, 96, 96)
    with torch.inference_mode():
        logits = model.head(model.extract_feat(image))
    assert_agrees(logits, reference_arrays('vim')[case])


def test_bidirectional_sequence_is_the_forward_scan_in_tests_and_either_in_training(load_config, fill_parameters):
    cfg = load_config('vim_ablations/vim-ti-sequence_8xb128_in1k.py')
    init_default_scope(cfg.default_scope)
    cfg.model.backbone.update(SMALL, drop_path_rate=0.0)
    sequence = fill_parameters(MODELS.build(cfg.model.backbone), 7)
    forward = fill_parameters(MODELS.build(dict(cfg.model.backbone, directions='none')), 7)
    image = torch.randn(2, 3, 96, 96)
    with torch.inference_mode():
        expected = forward(image)[0]
        assert torch.equal(sequence(image)[0], expected)
        torch.manual_seed(0)
        same = {torch.equal(sequence.train()(image)[0], expected) for _ in range(12)}
    assert same == {True, False}
