"""VisionMamba beyond the reference arrays: sizes, options, gradients, initialisation, bad arguments."""

import pytest
import torch
import torch.nn.functional as F
from mmengine.registry import MODELS

import mmvim  # noqa: F401
from mmvim.models import VisionMamba
from mmvim.models.layers.class_tokens import class_token_positions

TINY = dict(arch=dict(embed_dims=32, depth=4), img_size=64)
DENSE = dict(TINY, cls_token=None, out_type='featmap')


def build(**kwargs):
    model = MODELS.build(dict(type='mmvim.VisionMamba', **kwargs))
    model.init_weights()
    return model


@pytest.mark.parametrize('arch', sorted(set(VisionMamba.arch_zoo)))
def test_arch_zoo_builds(arch):
    model = MODELS.build(dict(type='mmvim.VisionMamba', arch=arch, out_indices=(0, 1), final_norm=False))
    assert model.out_channels == (VisionMamba.arch_zoo[arch]['embed_dims'],) * 2


@pytest.mark.parametrize('directions', VisionMamba.DIRECTIONS)
@pytest.mark.parametrize('cls_token', VisionMamba.CLS_TOKENS)
def test_every_parameter_gets_a_gradient_on_a_non_square_image(directions, cls_token):
    model = build(**TINY, directions=directions, cls_token=cls_token, out_type='raw', layer_scale_init=1.0)
    model(torch.randn(2, 3, 48, 80))[0].square().sum().backward()
    missing = [n for n, p in model.named_parameters() if p.grad is None or not p.grad.abs().sum() > 0]
    assert not missing


@pytest.mark.parametrize('out_type', VisionMamba.OUT_TYPES)
@pytest.mark.parametrize('stride', [16, 8])
def test_output_shapes(out_type, stride):
    model = build(**TINY, out_type=out_type, out_indices=(1, 3), patch_stride=stride).eval()
    h, w = (3, 5) if stride == 16 else (5, 9)
    shapes = {'raw': (2, h * w + 1, 32), 'featmap': (2, 32, h, w)}
    for output in model(torch.randn(2, 3, 48, 80)):
        assert tuple(output.shape) == shapes.get(out_type, (2, 32))


@pytest.mark.parametrize('size', [(1, 1), (7, 300), (17, 15), (64, 64), (100, 33)])
def test_any_image_size(size):
    (feature_map,) = build(**DENSE)(torch.randn(1, 3, *size))
    assert tuple(feature_map.shape[-2:]) == tuple(-(-side // 16) for side in size)
    assert feature_map.isfinite().all()


def test_padding_is_zeros_at_the_right_and_the_bottom():
    model = build(**DENSE).eval()
    image = torch.randn(1, 3, 40, 50)
    assert torch.equal(model(image)[0], model(F.pad(image, (0, 14, 0, 8)))[0])


@pytest.mark.parametrize('cls_token', VisionMamba.CLS_TOKENS)
def test_positions_of_another_grid_are_those_of_the_patches_interpolated(cls_token):
    model = build(**TINY, cls_token=cls_token, out_type='avg_featmap')
    source, target = class_token_positions(cls_token, 16), class_token_positions(cls_token, 15)
    patches = model.pos_embed[:, [i for i in range(model.pos_embed.shape[1]) if i not in source]]
    table = model.positions((3, 5))
    grid = F.interpolate(patches.reshape(1, 4, 4, 32).permute(0, 3, 1, 2), size=(3, 5), mode='bicubic')
    expected = grid.flatten(2).transpose(1, 2)
    torch.testing.assert_close(table[:, [i for i in range(table.shape[1]) if i not in target]], expected)
    for i, j in zip(source, target, strict=True):
        assert torch.equal(table[:, j], model.pos_embed[:, i])


OPTIONS = {
    'divide_output': dict(divide_output=False),
    'rotary hidden': dict(rotary='hidden'),
    'rotary both': dict(rotary='both'),
    'rotary size': dict(rotary='both', rotary_pretrain_size=4),
    'layer scale': dict(layer_scale_init=0.5),
    'residual': dict(feature_source='residual'),
    'final norm': dict(final_norm=True),
    'v1': dict(directions='v1'),
    'none': dict(directions='none'),
    'block': dict(directions='block'),
    'state size': dict(arch=dict(embed_dims=32, depth=4, d_state=8)),
    'rank of delta': dict(arch=dict(embed_dims=32, depth=4, dt_rank=5)),
    'stride': dict(patch_stride=8),
}


def test_every_option_changes_the_output(fill_parameters, reference_input):
    image = reference_input(0, 1, 3, 64, 64)
    outputs = {'default': fill_parameters(build(**DENSE), 7)(image)[0]}
    for name, option in OPTIONS.items():
        outputs[name] = fill_parameters(build(**{**DENSE, **option}), 7)(image)[0]
    names = list(outputs)
    for i, a in enumerate(names):
        for b in names[:i]:
            if outputs[a].shape == outputs[b].shape:
                assert not torch.allclose(outputs[a], outputs[b], rtol=1e-4), f'{a} and {b} give the same'


def test_rotary_leaves_class_tokens_alone_and_turns_every_patch():
    model = build(**TINY, rotary='both', cls_token='middle')
    cos, sin = model._rotary_tables((4, 5), torch.zeros(1))
    assert tuple(cos.shape) == (21, 16)
    assert torch.equal(cos[10], torch.ones(16)) and torch.equal(sin[10], torch.zeros(16))
    patches = model.rotary.tables((4, 5), 'cpu')
    assert torch.equal(torch.cat((cos[:10], cos[11:])), patches[0])
    # The last row stands at 3/4 of the pre-training side whatever the number of rows: angle 10.5 at frequency 1.
    torch.testing.assert_close(sin[-1, 0], torch.tensor(0.75 * 14).sin())
    torch.testing.assert_close(sin[-1, 8], torch.tensor(0.8 * 14).sin())


def test_sequence_mode_scans_backwards_in_training_only():
    torch.manual_seed(0)
    model = build(**DENSE, directions='sequence', reverse_prob=1.0)
    image = torch.randn(1, 3, 64, 64)
    forward, backward = model.eval()(image)[0], model.train()(image)[0]
    assert not torch.allclose(forward, backward)
    # With no positions, scanning an image turned by 180 degrees (patch by patch) forwards is scanning it backwards.
    torch.nn.init.zeros_(model.pos_embed)
    patches = F.unfold(image, 16, stride=16).flip(-1)
    turned = F.fold(patches, 64, 16, stride=16)
    torch.testing.assert_close(model.eval()(turned)[0], model.train()(image)[0].flip(-1, -2), rtol=1e-4, atol=1e-5)
    model.reverse_prob = 0.0
    assert torch.equal(model.train()(image)[0], model.eval()(image)[0])


def test_stochastic_depth_rates():
    model = build(**dict(DENSE, drop_path_rate=0.3))
    rates = [getattr(layer.drop_path, 'drop_prob', 0.0) for layer in model.layers]
    assert rates == pytest.approx([0.0, 0.0, 0.1, 0.2])
    assert model.drop_path.drop_prob == 0.3
    image = torch.randn(4, 3, 64, 64)
    assert not torch.equal(model(image)[0], model(image)[0])


def test_blocks_behind_the_last_output_are_not_built():
    model = build(**dict(DENSE, out_indices=(0, 1)))
    assert len(model.layers) == 2
    assert model.get_layer_depth('layers.1.norm.weight') == (2, 6)


RESIDUAL = dict(DENSE, feature_source='residual', drop_path_rate=0.6)


def released_maps(model, image):
    """Residual features as the released segmentation code takes them, which has the detector's as its last."""
    patches, grid = model.patch_embed(image)
    hidden, residual, streams = patches + model.pos_embed, None, []
    tables = model._rotary_tables(grid, hidden)
    for layer in model.layers:
        if model.rotary_mode:
            hidden = model.rotary(hidden, *tables)
        if model.rotary_mode == 'both' and residual is not None:
            residual = model.rotary(residual, *tables)
        hidden, residual = layer(hidden, residual)
        streams.append(residual)
    return [stream.transpose(1, 2).unflatten(2, grid) for stream in (*streams[1:], hidden + residual)]


@pytest.mark.parametrize('training', [True, False])
@pytest.mark.parametrize('with_cp', [True, False])
@pytest.mark.parametrize('rotary', [None, 'hidden', 'both'])
def test_residual_features_are_the_released_ones(rotary, with_cp, training):
    model = build(**RESIDUAL, rotary=rotary, with_cp=with_cp, out_indices=(0, 1, 2, 3)).train(training)
    image = torch.randn(8, 3, 64, 64)
    torch.manual_seed(0)
    maps = model(image)
    torch.manual_seed(0)
    for i, (found, expected) in enumerate(zip(maps, released_maps(model, image), strict=True)):
        torch.testing.assert_close(found, expected, msg=lambda text, i=i: f'map {i}: {text}')


@pytest.mark.parametrize('training', [True, False])
def test_a_residual_feature_is_the_same_whether_the_next_block_is_built_or_not(training):
    image = torch.randn(8, 3, 64, 64)
    torch.manual_seed(0)
    whole = build(**RESIDUAL, rotary='both', out_indices=(2, 3)).train(training)
    part = build(**RESIDUAL, rotary='both', out_indices=2).train(training)
    part.load_state_dict({name: whole.state_dict()[name] for name in part.state_dict()})
    maps = []
    for model in (whole, part):
        torch.manual_seed(0)
        maps.append(model(image)[0])
    torch.testing.assert_close(*maps)


@pytest.mark.parametrize('out_type', VisionMamba.OUT_TYPES)
def test_stochastic_depth_after_the_last_block_is_the_classifiers_alone(out_type):
    model = build(**dict(TINY, drop_path_rate=0.6, out_type=out_type, feature_source='residual')).train()
    for layer in model.layers[2:]:
        layer.drop_path.drop_prob = 0.0
    image = torch.randn(8, 3, 64, 64)
    assert torch.equal(model(image)[0], model.eval()(image)[0]) == (out_type == 'featmap')


@pytest.mark.parametrize('autocast', [False, True])
def test_bfloat16(autocast):
    torch.manual_seed(0)
    model = build(**DENSE).eval()
    image = torch.randn(1, 3, 64, 64)
    expected = model(image)[0]
    if autocast:
        with torch.autocast('cpu', torch.bfloat16):
            actual = model(image)[0]
    else:
        actual = model.bfloat16()(image.bfloat16())[0]
    assert (actual.float() - expected).norm() < 0.03 * expected.norm()


def test_initialisation():
    torch.manual_seed(0)
    model = build(arch=dict(embed_dims=96, depth=4), img_size=224)
    mixer = model.layers[0].mixer
    dt = F.softplus(mixer.dt_proj.bias)
    assert 1e-3 * 0.99 <= dt.min() and dt.max() <= 1e-1 * 1.01
    # Log-uniform: the mean of log10 is -2 and its standard deviation 2 / sqrt(12).
    assert abs(dt.log10().mean() + 2) < 0.15 and abs(dt.log10().std() - 0.577) < 0.1
    assert torch.equal(mixer.A_log[3], torch.arange(1.0, 17).log())
    assert torch.equal(mixer.A_b_log, mixer.A_log)
    assert torch.equal(mixer.D, torch.ones(192))
    assert mixer.dt_proj.weight.abs().max() <= 6**-0.5
    # Kaiming-uniform with a = sqrt(5) is uniform in +-fan_in ** -0.5; then comes 1 / sqrt(depth).
    assert 0.95 * 192**-0.5 / 2 < mixer.out_proj.weight.abs().max() <= 192**-0.5 / 2
    assert abs(model.patch_embed.proj.weight.std() - (3 * 16 * 16) ** -0.5) < 5e-4
    assert abs(model.pos_embed.std() - 0.02) < 1e-3


def test_frozen_stages():
    model = build(**dict(DENSE, frozen_stages=2))
    model.train()
    trained = {name for name, p in model.named_parameters() if p.requires_grad}
    assert trained and all(name.startswith(('layers.2.', 'layers.3.')) for name in trained)
    assert not model.layers[1].training and model.layers[2].training


def test_no_weight_decay_set():
    model = build(**TINY, cls_token='double', out_type='cls_token')
    names = {name.rpartition('.')[2] for name in model.no_weight_decay()}
    assert names == {'pos_embed', 'cls_token_head', 'cls_token_tail', 'A_log', 'A_b_log', 'D', 'D_b'}
    assert model.no_weight_decay() <= set(dict(model.named_parameters()))


@pytest.mark.parametrize(
    ('kwargs', 'message'),
    [
        (dict(arch='huge'), 'arch must be one of'),
        (dict(arch=dict(embed_dims=32)), 'depth'),
        (dict(out_type='tokens'), 'out_type must be one of'),
        (dict(cls_token='tail'), 'cls_token must be one of'),
        (dict(cls_token=None), "out_type='cls_token' needs a class token"),
        (dict(directions='both'), 'directions must be one of'),
        (dict(out_indices=(24,)), 'out_indices must rise within 0 to 23'),
        (dict(out_indices=(5, 3)), 'out_indices must rise'),
        (dict(out_indices=()), 'out_indices must rise'),
        (dict(out_indices=(5,), final_norm=True), 'final_norm belongs to the last block'),
        (dict(directions='block', out_indices=(22,), final_norm=False), 'joins blocks in pairs'),
        (dict(drop_path_rate=1.0), 'drop_path_rate'),
        (dict(with_cp='no'), "with_cp must be True or False, got 'no'"),
        (dict(frozen_stages=None), 'frozen_stages must be in -1 to .*, got None'),
        (dict(out_indices='1'), "out_indices must be a whole number or several, got '1'"),
        (dict(frozen_stages=25), 'frozen_stages'),
        (dict(arch=dict(embed_dims=30, depth=2), rotary='both'), 'multiple of 4'),
        (dict(patch_size=0), 'patch_size must be a whole number of at least 1, got 0'),
        (dict(patch_stride=-4), 'patch_stride must be a whole number of at least 1, got -4'),
        (dict(patch_stride=0), 'patch_stride must be a whole number of at least 1, got 0'),
        (dict(patch_size=16.0), 'patch_size must be a whole number of at least 1, got 16.0'),
        (dict(in_channels=0), 'in_channels must be a whole number of at least 1'),
        (dict(interpolate_mode='cubic'), "interpolate_mode must be one of .*'bicubic'.*got 'cubic'"),
        (dict(interpolate_mode='linear'), 'interpolate_mode must be one of'),
        (dict(arch=dict(embed_dims=0, depth=2)), 'embed_dims of arch must be a whole number of at least 1, got 0'),
        (dict(arch=dict(embed_dims=32, depth=-1)), 'depth of arch must be a whole number of at least 0, got -1'),
        (dict(arch=dict(embed_dims=32, depth=2, d_conv=5)), 'd_conv of arch must be 2 to 4, got 5'),
        (dict(arch=dict(embed_dims=32, depth=2, d_conv=1)), 'd_conv of arch must be 2 to 4, got 1'),
        (dict(arch=dict(embed_dims=32, depth=2, d_state=0)), 'd_state of arch must be'),
        (dict(arch=dict(embed_dims=32, depth=2, expand=0.5)), 'expand of arch must be'),
        (dict(arch=dict(embed_dims=32, depth=2, dt_rank=-1)), 'dt_rank of arch must be'),
        (dict(img_size=None), 'img_size is None, .* config that training saved .* model.backbone.img_size'),
        (dict(img_size=(224,)), r'img_size must be a whole number of at least 1, or height and width, got \(224,\)'),
        (dict(img_size=0), 'img_size must be'),
    ],
)
def test_bad_arguments(kwargs, message):
    with pytest.raises(ValueError, match=message):
        VisionMamba(**kwargs)


def test_an_open_size_of_a_config_for_ones_own_folder_is_explained():
    with pytest.raises(ValueError, match='use the config that training saved in its work directory'):
        VisionMamba(img_size=None)
