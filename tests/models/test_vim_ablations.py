"""Each design of the ablation configs, built from the config itself, gives the original model's logits."""

import itertools

import pytest
import torch
from mmengine.registry import MODELS, init_default_scope

import mmvim  # noqa: F401

SMALL = dict(arch=dict(embed_dims=64, depth=4), img_size=96)
# config, array, seed; directions were recorded with the class token in the middle, not with the mean of the ablation
MIDDLE = dict(cls_token='middle', out_type='cls_token')
CASES = [
    ('cls-mean', 'vim_mean_pool', 13, {}),
    ('cls-max', 'vim_max_pool', 14, {}),
    ('cls-head', 'vim_head_cls', 11, {}),
    ('cls-double', 'vim_double_cls', 12, {}),
    ('none', 'vim_bidir_none', 16, MIDDLE),
    ('block', 'vim_bidir_block', 17, MIDDLE),
    ('ssm', 'vim_bidir_ssm_v1', 18, MIDDLE),
    ('sequence', 'vim_bidir_none', 16, MIDDLE),  # in tests it scans forwards
]
DIRECTIONS = {'': 'v2', '-none': 'none', '-sequence': 'sequence', '-block': 'block', '-ssm': 'v1'}
IMAGENET = ('cls-mean', 'cls-max', 'cls-head', 'cls-double', 'none', 'sequence', 'block', 'ssm')


def published(name):
    return name.removeprefix('backbone.').replace('head.fc.', 'head.')


@pytest.fixture
def classifier(load_config, fill_parameters):
    """Function (config, seed, changes of the backbone) that builds a small classifier and fills its parameters."""

    def build(name, seed, **changes):
        cfg = load_config(name)
        init_default_scope(cfg.default_scope)
        cfg.model.backbone.update({**SMALL, **changes})
        cfg.model.head.update(in_channels=64, num_classes=10)
        cfg.model.train_cfg = None
        return fill_parameters(MODELS.build(cfg.model), seed, published)

    return build


def logits_of(model, image):
    with torch.inference_mode():
        return model.head(model.extract_feat(image))


@pytest.mark.parametrize(('name', 'case', 'seed', 'changes'), CASES, ids=[case[0] for case in CASES])
def test_the_config_gives_the_logits(
    name, case, seed, changes, classifier, reference_input, reference_arrays, assert_agrees
):
    model = classifier(f'vim_ablations/vim-ti-{name}_8xb128_in1k.py', seed, **changes)
    assert_agrees(logits_of(model, reference_input(seed, 2, 3, 96, 96)), reference_arrays('vim')[case])


def test_what_the_ablations_start_from_gives_the_logits(
    load_config, fill_parameters, reference_input, reference_arrays, assert_agrees
):
    """The class token in the middle, both directions with parameters of their own, at full size."""
    cfg = load_config('vim/vim-ti_8xb128_in1k.py')
    init_default_scope(cfg.default_scope)
    cfg.model.train_cfg = None
    model = fill_parameters(MODELS.build(cfg.model), 1, published)
    assert_agrees(logits_of(model, reference_input(1, 2, 3, 224, 224)), reference_arrays('vim')['vim_tiny_224'])


def assert_all_differ(outputs):
    """No two outputs are the same, but for those of the strategies that differ in training alone."""
    for (first, a), (second, b) in itertools.combinations(outputs.items(), 2):
        if {first.strip('-'), second.strip('-')} == {'none', 'sequence'}:
            assert torch.equal(a, b)
        else:
            assert (a - b).abs().max() > 0.05 * a.std(), (first, second)


def test_every_switch_changes_the_logits(classifier, reference_input):
    names = {'': 'vim/vim-ti_8xb128_in1k.py'}
    names.update({name: f'vim_ablations/vim-ti-{name}_8xb128_in1k.py' for name in IMAGENET})
    image = reference_input(7, 2, 3, 96, 96)
    models = {name: classifier(path, 7) for name, path in names.items()}
    assert_all_differ({name: logits_of(model, image) for name, model in models.items()})
    for name, model in models.items():
        assert model.backbone.directions == DIRECTIONS.get(f'-{name}', 'v2')


def test_every_strategy_changes_the_maps_of_the_segmenter(load_config, fill_parameters, reference_input):
    maps = {}
    for name, directions in DIRECTIONS.items():
        cfg = load_config(f'vim_ablations/segmenter_vim-ti{name}_8xb2-160k_ade20k-512x512.py')
        backbone = fill_parameters(MODELS.build({**cfg.model.backbone, **SMALL}), 7)
        assert backbone.directions == directions
        with torch.inference_mode():
            (maps[name],) = backbone(reference_input(7, 1, 3, 96, 96))
        assert maps[name].shape == (1, 64, 6, 6)
    assert_all_differ(maps)


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
