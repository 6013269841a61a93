"""VisionTransformer reproduces ViTDet's stored maps and timm's DeiT, forward and backward, in every setting."""

import copy

import numpy as np
import pytest
import torch
from mmengine.registry import MODELS
from torch import nn

import mmvim  # noqa: F401
from mmvim.models import VisionTransformer

SMALL = dict(embed_dims=64, depth=4, num_heads=2)
VITDET = dict(arch=SMALL, out_type='featmap', with_cls_token=False)
WINDOWS = dict(VITDET, window_size=7, global_attn_indexes=(3,))
# case: seed, height, width, arguments
MAPS = {
    'vitdet_window7_160': (61, 160, 160, WINDOWS),
    'vitdet_window7_160x208': (62, 160, 208, WINDOWS),
    'vitdet_window0_160': (63, 160, 160, VITDET),
}


def build(**kwargs):
    return MODELS.build(dict(type='mmvim.VisionTransformer', **kwargs)).eval()


def random_weights(model, seed=0):
    """Weights as large as a trained model's, so that attention is far from uniform."""
    torch.manual_seed(seed)
    for name, parameter in model.named_parameters():
        nn.init.normal_(parameter, mean=float(name.endswith('.weight') and parameter.ndim == 1), std=0.1)
    return model


def reference_weights(fill_parameters, seed):
    """Those of the stored cases: their position table has 14 x 14 entries and one of a class token."""
    source = build(arch=SMALL)
    weights = fill_parameters(source, seed).state_dict()
    return {name: value for name, value in weights.items() if not name.startswith(('cls_token', 'norm.'))}


@pytest.mark.parametrize('when', ['interpolated on loading', 'interpolated at run time'])
@pytest.mark.parametrize('attention', ['sdpa', 'materialized'])
@pytest.mark.parametrize('case', MAPS)
def test_stored_maps(case, attention, when, fill_parameters, reference_input, reference_arrays, assert_agrees):
    seed, height, width, kwargs = MAPS[case]
    img_size = (height, width) if when == 'interpolated on loading' else 224
    model = build(**kwargs, img_size=img_size, attention=attention)
    model.load_state_dict(reference_weights(fill_parameters, seed))
    assert [block.window_size for block in model.blocks] == ([7, 7, 7, 0] if 'window7' in case else [0] * 4)
    with torch.inference_mode():
        (feature_map,) = model(reference_input(seed, 1, 3, height, width))
    assert_agrees(feature_map, reference_arrays('vitdet')[case])


def gradients(model, image):
    model.zero_grad()
    outputs = torch.cat([output.flatten() for output in model(image)])
    weight = np.random.default_rng(1061).standard_normal(outputs.numel())
    (outputs * torch.from_numpy(weight).to(outputs)).sum().backward()
    return {name: parameter.grad for name, parameter in model.named_parameters()}


@pytest.mark.parametrize(
    'settings', [dict(attention='sdpa'), dict(attention='materialized'), dict(with_cp=True)], ids=str
)
@pytest.mark.parametrize(
    'case', [case if '208' in case else pytest.param(case, marks=pytest.mark.slow) for case in MAPS]
)
def test_gradients_are_those_of_float64_by_finite_differences(case, settings, fill_parameters, reference_input):
    """Along a random direction for each parameter; float32 keeps to float64 within 1e-4 of the norm."""
    seed, height, width, kwargs = MAPS[case]
    model = build(**kwargs, img_size=(height, width), **settings)
    model.load_state_dict(reference_weights(fill_parameters, seed))
    image = reference_input(seed, 1, 3, height, width)
    exact = copy.deepcopy(model).double()
    expected = gradients(exact, image.double())
    found = gradients(model, image)
    for name, gradient in expected.items():
        difference = (found[name] - gradient).norm()
        if name.endswith('qkv.bias'):  # the bias of keys shifts all logits alike: its gradient is rounding
            query, _, value = (found[name] - gradient).unflatten(0, (3, -1))
            difference = torch.stack((query, value)).norm()
        assert difference <= 1e-4 * gradient.norm(), name

    weight = torch.from_numpy(np.random.default_rng(1061).standard_normal(64 * (height // 16) * (width // 16)))
    generator = torch.Generator().manual_seed(seed)
    for name, parameter in exact.named_parameters():
        if not name.startswith(('pos_embed', 'patch_embed', 'blocks.0', 'blocks.3')):
            continue
        direction = torch.randn(parameter.shape, generator=generator, dtype=torch.float64)
        direction /= direction.norm()
        sums = []
        for step in (1e-4, -1e-4):
            with torch.no_grad():
                parameter += step * direction
                sums.append((exact(image.double())[0].flatten() * weight).sum())
                parameter -= step * direction
        slope = (sums[0] - sums[1]) / 2e-4
        assert abs(slope - (expected[name] * direction).sum()) <= 1e-5 * expected[name].norm(), name


@pytest.fixture
def timm_deit():
    """timm's own DeiT-Ti with random weights, and a function that gives its maps after the given blocks."""
    timm = pytest.importorskip('timm')

    def create(**kwargs):
        return random_weights(timm.create_model('deit_tiny_patch16_224', num_classes=10, **kwargs)).eval()

    return create


@pytest.mark.parametrize('attention', ['sdpa', 'materialized'])
def test_features_of_timm_at_224(timm_deit, attention, assert_agrees):
    source = timm_deit()
    image = torch.randn(2, 3, 224, 224, generator=torch.Generator().manual_seed(0))
    for out_type in VisionTransformer.OUT_TYPES:
        model = build(arch='deit-tiny', out_type=out_type, final_norm=True, attention=attention)
        model.load_state_dict(source.state_dict())
        with torch.inference_mode():
            tokens = source.forward_features(image)
            expected = dict(
                cls_token=tokens[:, 0],
                avg_featmap=tokens[:, 1:].mean(1),
                featmap=tokens[:, 1:].transpose(1, 2).unflatten(2, (14, 14)),
                raw=tokens,
            )[out_type]
            assert_agrees(model(image)[0], expected.numpy())


def test_maps_and_gradients_of_timm_at_512_with_its_positions(timm_deit, assert_agrees):
    """Without windows, with timm's table for 512 as it is: the interpolation is the only thing that may differ."""
    source = timm_deit(img_size=512)
    model = build(arch='deit-tiny', img_size=512, out_type='featmap', out_indices=(2, 5, 8, 11))
    model.load_state_dict(source.state_dict())
    image = torch.randn(1, 3, 512, 512, generator=torch.Generator().manual_seed(0))
    expected = source.forward_intermediates(image, indices=[2, 5, 8, 11], intermediates_only=True)
    maps = model(image)
    for found, wanted in zip(maps, expected, strict=True):
        assert_agrees(found, wanted.detach().numpy())
    weight = torch.randn(expected[0].shape, generator=torch.Generator().manual_seed(1))
    sum((wanted * weight).sum() for wanted in expected).backward()
    sum((found * weight).sum() for found in maps).backward()
    theirs = dict(source.named_parameters())
    for name, parameter in model.named_parameters():
        norm = theirs[name].grad.norm()
        assert norm > 0 and (parameter.grad - theirs[name].grad).norm() <= 1e-4 * norm, name


def test_positions_of_a_timm_file_are_interpolated_without_the_class_token(timm_deit, assert_agrees):
    source = timm_deit()
    model = build(arch='deit-tiny', img_size=512, out_type='raw')
    model.load_state_dict(source.state_dict())
    table = source.pos_embed.detach()
    patches = table[:, 1:].reshape(1, 14, 14, 192).permute(0, 3, 1, 2)
    patches = nn.functional.interpolate(patches, (32, 32), mode='bicubic', align_corners=False)
    expected = torch.cat((table[:, :1], patches.flatten(2).transpose(1, 2)), dim=1)
    assert torch.equal(model.pos_embed, expected)


@pytest.mark.parametrize('name', VisionTransformer.arch_zoo)
def test_arch_zoo(name):
    model = build(arch=name, out_type='featmap', out_indices=(0, -1), drop_path_rate=0.1)
    arch = VisionTransformer.arch_zoo[name]
    assert model.out_channels == (arch['embed_dims'],) * 2 and model.out_strides == (16, 16)
    assert len(model.blocks) == arch['depth'] == 12 and arch['embed_dims'] == 64 * arch['num_heads']
    maps = model(torch.randn(1, 3, 32, 64))
    assert [tuple(m.shape) for m in maps] == [(1, arch['embed_dims'], 2, 4)] * 2
    assert isinstance(model.blocks[0].drop_path, nn.Identity)
    assert model.blocks[-1].drop_path.drop_prob == pytest.approx(0.1)


@pytest.mark.parametrize(('arch', 'millions'), [('deit-tiny', 5.717416), ('deit-small', 22.050664)])
def test_parameter_counts(arch, millions):
    model = build(arch=arch)
    head = 1001 * model.embed_dims - model.embed_dims + 1000
    assert sum(p.numel() for p in model.parameters()) + head == round(millions * 1e6)


@pytest.mark.parametrize('size', [(64, 96), (50, 70), (16, 16), (7, 33), (224, 208)])
@pytest.mark.parametrize('settings', [WINDOWS, dict(arch=SMALL, out_type='featmap')], ids=['windows', 'global'])
def test_any_image_size(settings, size):
    torch.manual_seed(0)
    model = build(**settings, img_size=64)
    model.init_weights()
    (feature_map,) = model.train()(torch.randn(2, 3, *size))
    assert feature_map.shape == (2, 64, -(-size[0] // 16), -(-size[1] // 16))
    feature_map.square().sum().backward()
    missing = [name for name, p in model.named_parameters() if p.grad is None or not torch.isfinite(p.grad).all()]
    assert not missing


def test_windows_do_not_see_each_other_and_global_blocks_do():
    image = torch.randn(1, 3, 224, 224, generator=torch.Generator().manual_seed(0))
    other = image.clone()
    other[..., :16, :16] += 1
    for indexes, wanted in (((), 7 * 7), ((-1,), 14 * 14)):
        model = random_weights(build(**VITDET, window_size=7, global_attn_indexes=indexes))
        with torch.inference_mode():
            changed = (model(image)[0] != model(other)[0]).any(1)
        assert changed.sum() == wanted
        assert changed[0, :7, :7].all()


def test_every_option_changes_the_result():
    image = torch.randn(1, 3, 96, 128, generator=torch.Generator().manual_seed(0))
    base = dict(VITDET, img_size=96)
    expected = random_weights(build(**base))
    for change in (
        dict(window_size=3),
        dict(window_size=4),
        dict(norm_eps=1e-1),
        dict(interpolate_mode='bilinear'),
        dict(final_norm=True),
    ):
        model = build(**{**base, **change})
        weights = expected.state_dict()
        if change.get('final_norm'):
            weights.update({'norm.weight': torch.ones(64), 'norm.bias': torch.zeros(64)})
        model.load_state_dict(weights)
        with torch.inference_mode():
            assert (model(image)[0] - expected(image)[0]).abs().max() > 1e-4, change
    dropping = build(**base, drop_path_rate=0.9, drop_rate=0.5).train()
    dropping.load_state_dict(expected.state_dict())
    assert (dropping(image)[0] - expected(image)[0]).abs().max() > 1e-4


@pytest.mark.parametrize('attention', ['sdpa', 'materialized'])
@pytest.mark.parametrize('autocast', [False, True])
def test_bfloat16(autocast, attention):
    model = random_weights(build(**WINDOWS, attention=attention))
    image = torch.randn(1, 3, 128, 160, generator=torch.Generator().manual_seed(0))
    with torch.inference_mode():
        expected = model(image)[0]
        if autocast:
            with torch.autocast('cpu', torch.bfloat16):
                actual = model(image)[0]
        else:
            actual = model.bfloat16()(image.bfloat16())[0]
    assert (actual.float() - expected).norm() < 0.03 * expected.norm()


def test_only_the_materialized_switch_holds_the_weights_in_memory():
    """Counted in the tensors that autograd keeps: an L x L matrix a head with the switch, none without."""
    for attention, wanted in (('sdpa', False), ('materialized', True)):
        kept = []
        model = build(arch=SMALL, attention=attention, out_type='raw')
        with torch.autograd.graph.saved_tensors_hooks(
            lambda t, kept=kept: kept.append(tuple(t.shape)) or t, lambda t: t
        ):
            model(torch.randn(1, 3, 128, 128))
        assert any(shape[-2:] == (65, 65) for shape in kept) == wanted


def test_frozen_stages():
    model = build(arch=SMALL, frozen_stages=2, drop_rate=0.5).train()
    trained = {name for name, p in model.named_parameters() if p.requires_grad}
    assert trained and all(name.startswith(('blocks.2.', 'blocks.3.', 'norm.')) for name in trained)
    assert not model.blocks[1].training and model.blocks[2].training and not model.drop_after_pos.training


def test_layer_depths_and_weight_decay():
    model = build(arch=SMALL)
    depths = {name: model.get_layer_depth(f'backbone.{name}', 'backbone.') for name, _ in model.named_parameters()}
    assert {n for _, n in depths.values()} == {6}
    assert depths['pos_embed'] == depths['cls_token'] == depths['patch_embed.proj.weight'] == (0, 6)
    assert [depths[f'blocks.{i}.attn.qkv.weight'][0] for i in range(4)] == [1, 2, 3, 4]
    assert depths['norm.weight'] == model.get_layer_depth('neck.a', 'backbone.') == (5, 6)
    assert model.no_weight_decay() == {'pos_embed', 'cls_token'}
    assert build(**VITDET).no_weight_decay() == {'pos_embed'}


def test_initialisation():
    torch.manual_seed(0)
    model = build(arch='deit-tiny')
    model.init_weights()
    assert abs(model.blocks[3].mlp.fc1.weight.std() - 0.02) < 5e-4
    assert abs(model.patch_embed.proj.weight.std() - (3 * 16 * 16) ** -0.5) < 5e-4
    assert abs(model.pos_embed.std() - 0.02) < 1e-3 and model.cls_token.abs().max() > 0
    assert all(not p.any() for name, p in model.named_parameters() if name.endswith('bias'))


@pytest.mark.parametrize(
    ('kwargs', 'message'),
    [
        (dict(arch='deit-huge'), r"arch must be one of \('deit-ti'"),
        (dict(arch=dict(embed_dims=32)), 'num_heads'),
        (
            dict(arch=dict(embed_dims=32, depth=2, num_heads=3)),
            'num_heads of arch must divide embed_dims, got 3 and 32',
        ),
        (dict(out_type='tokens'), 'out_type must be one of'),
        (dict(attention='flash'), r"attention must be one of \('sdpa', 'materialized'\)"),
        (dict(with_cls_token=False), "out_type='cls_token' needs a class token"),
        (dict(window_size=14), 'a class token belongs to no window: set with_cls_token=False'),
        (dict(window_size=-1), 'window_size must be a whole number of at least 0'),
        (dict(VITDET, global_attn_indexes=(4,)), 'global_attn_indexes must be within 0 to 3'),
        (dict(out_indices=(12,)), 'out_indices must rise within 0 to 11'),
        (dict(out_indices=(5, 3)), 'out_indices must rise'),
        (dict(out_indices=()), 'out_indices must rise'),
        (dict(out_indices=(5,), final_norm=True), 'final_norm belongs to the last block'),
        (dict(drop_path_rate=1.0), 'drop_path_rate'),
        (dict(with_cp='no'), "with_cp must be True or False, got 'no'"),
        (dict(frozen_stages=None), 'frozen_stages must be in -1 to .*, got None'),
        (dict(out_indices='1'), "out_indices must be a whole number or several, got '1'"),
        (dict(frozen_stages=13), 'frozen_stages'),
        (dict(patch_size=0), 'patch_size must be a whole number of at least 1, got 0'),
        (dict(in_channels=-3), 'in_channels must be a whole number of at least 1'),
        (dict(interpolate_mode='linear'), 'interpolate_mode must be one of'),
        (dict(arch=dict(embed_dims=0, depth=2, num_heads=1)), 'embed_dims of arch must be'),
        (dict(arch=dict(embed_dims=32, depth=0, num_heads=1)), 'depth of arch must be a whole number of at least 1'),
        (dict(arch=dict(embed_dims=32, depth=2, num_heads=0)), 'num_heads of arch must be a whole number of at least'),
        (dict(arch=dict(embed_dims=32, depth=2, num_heads=1, mlp_ratio=0)), 'mlp_ratio of arch must be'),
        (dict(img_size=None), 'img_size is None, .* config that training saved .* model.backbone.img_size'),
        (dict(img_size=(64, 64, 3)), 'img_size must be'),
    ],
)
def test_bad_arguments(kwargs, message):
    with pytest.raises(ValueError, match=message):
        VisionTransformer(**kwargs)
