"""MambaVision beyond the reference arrays: sizes, windows, options, gradients, initialisation, bad arguments."""

import pytest
import torch
import torch.nn.functional as F
from mmcv.cnn.bricks import DropPath
from mmengine.optim import build_optim_wrapper
from mmengine.registry import MODELS
from torch import nn

import mmvim  # noqa: F401
from mmvim.models import MambaVision
from mmvim.models.backbones.mambavision import attention_places
from mmvim.models.layers import MambaVisionMixer
from mmvim.models.layers.windows import from_windows, to_windows, window_shape
from mmvim.tools.flop_counter import analyzer, count

ARCH = dict(embed_dims=16, stem_channels=8, depths=(1, 1, 4, 3), num_heads=(1, 2, 2, 4))
SMALL = dict(arch=ARCH, window_sizes=(8, 8, 4, 3))


def build(**kwargs):
    model = MODELS.build(dict(type='mmvim.MambaVision', **{**SMALL, **kwargs}))
    model.init_weights()
    return model


@pytest.mark.parametrize('arch', sorted(set(MambaVision.arch_zoo)))
def test_arch_zoo_builds(arch):
    with torch.device('meta'):
        model = MODELS.build(dict(type='mmvim.MambaVision', arch=arch))
    width = MambaVision.arch_zoo[arch]['embed_dims']
    assert model.out_channels == (width, 2 * width, 4 * width, 8 * width)
    assert model.out_strides == (4, 8, 16, 32)


@pytest.mark.parametrize('size', [(4, 4), (5, 130), (33, 31), (64, 96), (97, 43)])
@pytest.mark.parametrize('fit_windows', [False, True])
def test_any_image_size(size, fit_windows):
    model = build(fit_windows=fit_windows).eval()
    maps = model(torch.randn(2, 3, *size))
    assert len(maps) == 4
    for i, feature_map in enumerate(maps):
        stride = model.out_strides[i]
        assert tuple(feature_map.shape) == (2, model.out_channels[i], *(-(-side // stride) for side in size))
        assert feature_map.isfinite().all()


def test_training_needs_more_than_one_value_a_channel():
    model = build(out_indices=(3,), out_type='avg_featmap')
    with pytest.raises(ValueError, match='more than 1 value per channel'):
        model.train()(torch.randn(1, 3, 32, 32))
    for trained, image in (
        (model, torch.randn(2, 3, 32, 32)),
        (model, torch.randn(1, 3, 33, 32)),
        (build(out_type='avg_featmap', norm_eval=True), torch.randn(1, 3, 4, 4)),
    ):
        (out,) = trained.train()(image)
        assert out.isfinite().all()


def test_an_image_smaller_than_the_stem():
    with pytest.raises(ValueError, match='the image has 3x64 pixels; each side must be at least 4'):
        build()(torch.randn(1, 3, 3, 64))


@pytest.mark.parametrize('fit', [False, True])
@pytest.mark.parametrize(('size', 'window'), [((4, 4), 4), ((5, 9), 4), ((1, 1), 7), ((3, 14), 7), ((15, 13), 6)])
def test_windows_there_and_back(size, window, fit):
    x = torch.arange(2 * 3 * size[0] * size[1], dtype=torch.float32).reshape(2, 3, *size) + 1
    shape = window_shape(size, window, fit)
    tokens = to_windows(x, shape, size)
    assert torch.equal(from_windows(tokens, shape, 2, size), x)
    assert (tokens != 0).sum() == x.numel()
    rows, columns = (-(-side // window) for side in size)
    assert tokens.shape[:2] == (2 * rows * columns, shape[0] * shape[1])
    # Row-major windows, and row-major tokens in each.
    assert torch.equal(
        tokens[0].reshape(*shape, 3)[: size[0], : size[1]], x[0, :, : shape[0], : shape[1]].movedim(0, -1)
    )


@pytest.mark.parametrize(
    ('size', 'window', 'shape'),
    [((84, 50), 112, (84, 50)), ((84, 50), 56, (42, 50)), ((32, 32), 14, (11, 11)), ((120, 7), 7, (7, 7))],
)
def test_fitted_windows(size, window, shape):
    """As few windows as the published setting has, none longer than it must be."""
    assert window_shape(size, window, False) == (window, window)
    assert window_shape(size, window, True) == shape
    for side, fitted in zip(size, shape, strict=True):
        assert -(-side // fitted) == -(-side // window)
        assert -(-side // (fitted - 1)) > -(-side // window)


def test_fitted_windows_change_nothing_where_nothing_was_padded(fill_parameters, reference_input):
    exact, padded = reference_input(0, 1, 3, 384, 192), reference_input(0, 1, 3, 96, 80)
    outputs = [
        [fill_parameters(build(fit_windows=fit), 7)(image)[-1] for fit in (False, True)] for image in (exact, padded)
    ]
    assert torch.equal(*outputs[0])
    assert not torch.allclose(*outputs[1], rtol=1e-3)


def test_padding_takes_part_in_published_windows(fill_parameters, reference_input):
    """A window that is larger than the map: the zeros behind each row separate it from the next in the scan."""
    model = fill_parameters(build(out_type='raw', attention='none', window_sizes=(8, 8, 12, 6)), 7)
    image = reference_input(0, 1, 3, 96, 96)
    level = model.levels[2]
    x = reference_input(1, 1, 64, 6, 6)
    tokens = F.pad(x, (0, 6, 0, 6)).permute(0, 2, 3, 1).reshape(1, 144, 64)
    for block in level.blocks:
        tokens = block(tokens, 1)
    expected = tokens.reshape(12, 12, 64)[:6, :6].movedim(-1, 0)
    torch.testing.assert_close(level(x)[0], expected)
    assert model(image)[2].shape == (1, 64, 6, 6)


def test_fitted_windows_save_the_work_of_padding():
    """COCO's 1333x800 with the published windows, at the widths of this small model."""
    costs = [
        count(lambda fit=fit: build(window_sizes=(8, 8, 112, 56), fit_windows=fit).eval(), [(1344, 800)])[0]
        for fit in (False, True)
    ]
    attention, linear = (
        [sum(kinds[kind] for kinds in cost.flops.values()) for cost in costs] for kind in ('attention', 'linear')
    )
    # 112x112 positions for a map of 84x50, and 56x56 for 42x25: 2.99 times as many.
    ratio = 112 * 112 / (84 * 50)
    assert linear[0] / linear[1] == pytest.approx(ratio, rel=0.01)
    assert attention[0] / attention[1] == pytest.approx(ratio**2, rel=0.01)


@pytest.mark.parametrize('out_type', MambaVision.OUT_TYPES)
def test_every_parameter_gets_a_gradient_on_a_non_square_image(out_type):
    arch = dict(ARCH, layer_scale=1.0)
    # in evaluation mode: BatchNorm in training takes away what a bias before it adds, and with it the gradient
    model = build(arch=arch, out_type=out_type).eval()
    sum(out.square().sum() for out in model(torch.randn(2, 3, 48, 80))).backward()
    missing = [n for n, p in model.named_parameters() if p.grad is None or not p.grad.abs().sum() > 0]
    assert not missing


def test_outputs():
    image = torch.randn(2, 3, 64, 48)
    torch.manual_seed(0)
    raw, normed = build(out_type='raw').eval(), build().eval()
    normed.load_state_dict(raw.state_dict(), strict=False)
    for i, (a, b) in enumerate(zip(raw(image), normed(image), strict=True)):
        expected = F.layer_norm(a.movedim(1, -1), a.shape[1:2], eps=1e-5).movedim(-1, 1)
        torch.testing.assert_close(b, expected, msg=f'level {i}')
    pooled = build(out_type='avg_featmap').eval()
    pooled.load_state_dict(raw.state_dict(), strict=False)
    (vector,) = pooled(image)
    torch.testing.assert_close(vector, (raw(image)[-1] / (1 + 1e-5) ** 0.5).mean((2, 3)))


def test_levels_behind_the_last_output_are_not_built():
    model = build(out_indices=(1, -2))
    assert model.out_indices == (1, 2) and len(model.levels) == 3
    assert model.out_channels == (32, 64) and model.out_strides == (8, 16)
    assert {name for name, _ in model.named_children() if 'norm' in name} == {'outnorm1', 'outnorm2'}
    assert not hasattr(model.levels[2], 'downsample')
    assert [tuple(out.shape) for out in model(torch.randn(1, 3, 64, 64))] == [(1, 32, 8, 8), (1, 64, 4, 4)]


OPTIONS = {
    'early': dict(attention='early'),
    'middle': dict(attention='middle'),
    'none': dict(attention='none'),
    'all': dict(attention='all'),
    'every third': dict(attention=3),
    'causal': dict(mixer_conv='causal'),
    'asymmetric': dict(mixer_symmetric=False),
    'gate': dict(mixer_merge='gate'),
    'causal gate': dict(mixer_conv='causal', mixer_merge='gate'),
    'layer scale': dict(arch=dict(ARCH, layer_scale=0.5)),
    'state size': dict(arch=dict(ARCH, d_state=16)),
    'width of the convolution': dict(arch=dict(ARCH, d_conv=4)),
    'mlp': dict(arch=dict(ARCH, mlp_ratio=2)),
    'windows': dict(window_sizes=(8, 8, 2, 3)),
    'fitted windows': dict(fit_windows=True),
}


def test_every_option_changes_the_output(fill_parameters, reference_input):
    image = reference_input(0, 1, 3, 64, 80)
    outputs = {'default': fill_parameters(build(), 7)(image)[-1]}
    for name, option in OPTIONS.items():
        outputs[name] = fill_parameters(build(**option), 7)(image)[-1]
    names = list(outputs)
    for i, a in enumerate(names):
        for b in names[:i]:
            assert not torch.allclose(outputs[a], outputs[b], rtol=1e-3), f'{a} and {b} give the same'


@pytest.mark.parametrize(
    ('depth', 'attention', 'places'),
    [
        (8, 'last', [4, 5, 6, 7]),
        (7, 'last', [4, 5, 6]),
        (5, 'last', [3, 4]),
        (1, 'last', []),
        (8, 'early', [0, 1, 2, 3]),
        (7, 'early', [0, 1, 2]),
        (8, 'middle', [2, 3, 4, 5]),
        (7, 'middle', [2, 3, 4]),
        (4, 'all', [0, 1, 2, 3]),
        (4, 'none', []),
        (8, 2, [1, 3, 5, 7]),
        (8, 3, [2, 5]),
        (4, 1, [0, 1, 2, 3]),
    ],
)
def test_places_of_attention(depth, attention, places):
    assert [i for i, attends in enumerate(attention_places(depth, attention)) if attends] == places


def test_causal_mixer_sees_no_later_token():
    torch.manual_seed(0)
    x = torch.randn(1, 12, 16)
    changed = x.clone()
    changed[:, 7:] += 1
    for conv in ('same', 'causal'):
        mixer = MambaVisionMixer(16, conv=conv)
        difference = (mixer(x) - mixer(changed)).abs().sum((0, 2))
        assert difference[7:].min() > 0
        assert (difference[:6].max() == 0) and (difference[6] == 0) == (conv == 'causal')


def test_stochastic_depth_rates():
    model = build(drop_path_rate=0.4)
    rates = [getattr(block.drop_path, 'drop_prob', 0.0) for level in model.levels for block in level.blocks]
    assert rates == pytest.approx([0.05 * i for i in range(9)])


def test_stochastic_depth_takes_part_in_dense_use_and_drops_whole_images():
    torch.manual_seed(0)
    model = build(drop_path_rate=0.5, norm_eval=True, out_type='raw').train()
    image = torch.randn(1, 3, 96, 96).expand(64, -1, -1, -1)
    x = model.patch_embed(image)
    for level in model.levels[:2]:
        x = level.downsample(level(x))
    block = model.levels[2].blocks[0]
    assert isinstance(block.drop_path, DropPath) and block.drop_path.drop_prob == pytest.approx(0.125)
    block.drop_path.drop_prob = 0.5
    tokens = to_windows(x[:1], (3, 3), x.shape[2:]).repeat(64, 1, 1)
    change = (block(tokens, 64) - tokens).flatten(1).norm(dim=1).view(64, 4)
    kinds = {tuple((row > 0).tolist()) for row in change}
    assert kinds == {(True,) * 4, (False,) * 4}
    assert not torch.equal(model(image[:8])[-1], model(image[:8])[-1])
    model.eval()
    assert torch.equal(model(image[:8])[-1], model(image[:8])[-1])


@pytest.mark.parametrize('convert', [lambda model: model, nn.SyncBatchNorm.convert_sync_batchnorm])
def test_checkpointing_changes_neither_gradients_nor_statistics(convert):
    image = torch.randn(2, 3, 64, 48)
    results = []
    for with_cp in (False, True):
        torch.manual_seed(0)
        model = convert(build(with_cp=with_cp, drop_path_rate=0.3)).train()
        torch.manual_seed(1)
        sum(out.square().mean() for out in model(image)).backward()
        results.append((dict(model.named_parameters()), dict(model.named_buffers())))
    (plain, buffers), (saved, saved_buffers) = results
    for name in plain:
        torch.testing.assert_close(plain[name].grad, saved[name].grad, msg=name)
    for name in buffers:
        assert torch.equal(buffers[name], saved_buffers[name]), name
    assert saved_buffers['levels.1.blocks.0.norm1.num_batches_tracked'] == 1


@pytest.mark.parametrize('autocast', [False, True])
def test_bfloat16(autocast):
    torch.manual_seed(0)
    model = build(arch=dict(ARCH, layer_scale=0.1)).eval()
    image = torch.randn(1, 3, 64, 96)
    expected = model(image)
    if autocast:
        with torch.autocast('cpu', torch.bfloat16):
            actual = model(image)
    else:
        actual = model.bfloat16()(image.bfloat16())
    for low, high in zip(actual, expected, strict=True):
        assert (low.float() - high).norm() < 0.03 * high.norm()


def test_initialisation():
    torch.manual_seed(0)
    model = build(arch=dict(ARCH, embed_dims=64, layer_scale=1e-5))
    block, last = model.levels[2].blocks[0], model.levels[3].blocks[-1]
    for linear in (block.mixer.in_proj, block.mixer.dt_proj, block.mlp.fc1, last.mixer.qkv, last.mixer.proj):
        assert abs(linear.weight.std() - 0.02) < 1.5e-3 and linear.weight.abs().max() < 0.12
        assert linear.bias is None or linear.bias.eq(0).all()
    assert torch.equal(block.mixer.A_log[3], torch.arange(1.0, 9).log())
    assert block.mixer.D.eq(1).all() and block.gamma_1.eq(1e-5).all() and last.gamma_2.eq(1e-5).all()
    careful = build(arch=dict(ARCH, embed_dims=64), dt_init='mamba').levels[3].blocks[0].mixer.dt_proj
    dt = F.softplus(2 * careful.bias)
    assert 1e-3 * 0.99 <= dt.min() and dt.max() <= 1e-1 * 1.01
    # Log-uniform: the mean of log10 is -2 and its standard deviation 2 / sqrt(12).
    assert abs(dt.log10().mean() + 2) < 0.15 and abs(dt.log10().std() - 0.577) < 0.1
    assert 0.9 * 32**-0.5 < careful.weight.abs().max() <= 32**-0.5


@pytest.mark.parametrize(
    ('frozen', 'trained'),
    [
        (-1, {'patch_embed', 'levels.0', 'levels.1', 'levels.2', 'levels.3'}),
        (0, {'levels.0', 'levels.1', 'levels.2', 'levels.3'}),
        (2, {'levels.2', 'levels.3'}),
        (4, set()),
    ],
)
def test_frozen_stages(frozen, trained):
    model = build(frozen_stages=frozen, out_type='raw').train()
    names = {name for name, p in model.named_parameters() if p.requires_grad}
    assert {'.'.join(name.split('.')[: 2 if name.startswith('levels') else 1]) for name in names} == trained
    before = {name: buffer.clone() for name, buffer in model.named_buffers()}
    model(torch.randn(2, 3, 64, 64))
    changed = {name for name, buffer in model.named_buffers() if not torch.equal(buffer, before[name])}
    assert {'.'.join(name.split('.')[: 2 if name.startswith('levels') else 1]) for name in changed} == {
        part for part in trained if part in ('patch_embed', 'levels.0', 'levels.1')
    }


def test_norm_eval_keeps_the_statistics():
    model = build(norm_eval=True, out_type='avg_featmap').train()
    assert model.training and model.levels[2].blocks[0].training
    assert not any(m.training for m in model.modules() if isinstance(m, nn.BatchNorm2d))
    assert model.levels[0].blocks[0].conv1.weight.requires_grad


def test_no_weight_decay_set():
    model = build()
    assert {name.rpartition('.')[2] for name in model.no_weight_decay()} == {'A_log', 'D'}
    assert model.no_weight_decay() <= set(dict(model.named_parameters()))


@pytest.mark.parametrize(
    ('name', 'depth'),
    [
        ('patch_embed.conv_down.0.weight', 0),
        ('levels.0.blocks.0.conv1.weight', 1),
        ('levels.0.downsample.reduction.0.weight', 1),
        ('levels.1.blocks.0.norm1.bias', 2),
        ('levels.2.blocks.0.mixer.A_log', 3),
        ('levels.2.blocks.3.mixer.qkv.bias', 6),
        ('levels.2.downsample.reduction.0.weight', 6),
        ('levels.3.blocks.2.mlp.fc1.weight', 9),
        ('outnorm3.weight', 10),
    ],
)
def test_layer_depths(name, depth):
    model = build()
    assert name in dict(model.named_parameters())
    assert model.get_layer_depth(name) == (depth, 11)
    assert model.get_layer_depth(f'backbone.{name}', 'backbone.') == (depth, 11)
    assert model.get_layer_depth(name, 'backbone.') == (10, 11)


def test_layer_decay_reaches_the_optimiser():
    model = nn.Module()
    model.backbone = build(arch=dict(ARCH, layer_scale=1e-5))
    wrapper = build_optim_wrapper(
        model,
        dict(
            type='OptimWrapper',
            optimizer=dict(type='AdamW', lr=1.0, weight_decay=0.05),
            constructor='mmvim.LayerDecayOptimWrapperConstructor',
            paramwise_cfg=dict(decay_rate=0.5),
        ),
    )
    names = {id(p): name for name, p in model.named_parameters()}
    found = {names[id(p)]: (g['lr'], g['weight_decay']) for g in wrapper.optimizer.param_groups for p in g['params']}
    assert found.keys() == set(names.values())
    assert found['backbone.patch_embed.conv_down.0.weight'] == (0.5**10, 0.05)
    assert found['backbone.levels.2.blocks.0.mixer.A_log'] == (0.5**7, 0)
    assert found['backbone.levels.2.blocks.0.gamma_1'] == (0.5**7, 0)
    assert found['backbone.levels.0.blocks.0.norm1.weight'] == (0.5**9, 0)
    assert found['backbone.outnorm0.weight'] == (1.0, 0)


@pytest.mark.parametrize(('arch', 'published'), [('tiny', 4.4), ('small', 7.5), ('base', 15.0)])
def test_operations_at_224_are_the_published_ones(arch, published):
    """In 1e9 multiplications. The published counts leave out the products inside of attention, and the scan."""
    model = MambaVision(arch, out_type='avg_featmap').eval()
    image = torch.randn(1, 3, 224, 224)
    composed = analyzer(model, image)
    assert composed.by_operator()['selective_scan_numba'] > 0
    with torch.no_grad():
        counted = analyzer(model, image)
        by_operator = counted.by_operator()
    assert counted.total() == composed.total()
    settings = MambaVision.arch_zoo[arch]
    attention = scans = inner = 0
    for level, tokens in ((2, 14 * 14), (3, 7 * 7)):
        width, depth = settings['embed_dims'] * 2**level, settings['depths'][level]
        mixers, rank = depth - depth // 2, -(-width // 16)
        attention += depth // 2 * 2 * tokens**2 * width
        scans += mixers * 3 * tokens * 8 * width // 2
        inner += mixers * tokens * width // 2 * (3 + (rank + 2 * 8) + rank + 3 * 8)
    assert by_operator['scaled_dot_product_attention'] == attention
    assert by_operator['mamba_inner_numba'] == inner
    head = model.out_channels[-1] * 1000
    assert (counted.total() - attention - scans + head) / 1e9 == pytest.approx(published, rel=0.03)


@pytest.mark.parametrize(
    ('kwargs', 'message'),
    [
        (dict(arch='huge'), 'arch must be one of'),
        (dict(arch=dict(embed_dims=16)), 'stem_channels'),
        (dict(arch=dict(ARCH, depths=(1, 2, 3))), 'depths of arch must be four whole numbers of at least 1'),
        (dict(arch=dict(ARCH, depths=(1, 2, 3, 0))), 'depths of arch must be four whole numbers of at least 1'),
        (
            dict(arch=dict(ARCH, num_heads=(1, 2, 3, 4))),
            r'3 heads do not divide the 64 channels of level 2; legal are \[1, 2, 4, 8, 16, 32, 64\]',
        ),
        (dict(arch=dict(ARCH, num_heads=(0, 2, 2, 4))), 'num_heads of arch must be four whole numbers of at least 1'),
        (dict(out_type='tokens'), 'out_type must be one of'),
        (dict(out_indices=(4,)), 'out_indices must rise within 0 to 3'),
        (dict(out_indices=(2, 1)), 'out_indices must rise'),
        (dict(out_indices=()), 'out_indices must rise'),
        (dict(out_type='avg_featmap', out_indices=(2,)), r"'avg_featmap' is of the last level: set out_indices=\(3,\)"),
        (dict(window_sizes=(8, 8, 0, 7)), 'window_sizes must be four whole numbers of at least 1'),
        (dict(window_sizes=(8, 8, -14, 7)), 'window_sizes must be four whole numbers of at least 1'),
        (dict(window_sizes=(14, 7)), 'window_sizes must be four whole numbers of at least 1'),
        (dict(window_sizes=14), 'window_sizes must be four whole numbers of at least 1'),
        (dict(window_sizes=(8, 8, 14.0, 7)), r'four whole numbers of at least 1, one per level, got \(8, 8, 14.0, 7\)'),
        (dict(window_sizes=(None, None, 14, 7)), 'window_sizes must be four whole numbers of at least 1'),
        (dict(window_sizes='8147'), "window_sizes must be four whole numbers of at least 1, one per level, got '8147'"),
        (dict(window_sizes=None), 'window_sizes must be four whole numbers of at least 1'),
        (dict(in_channels=0), 'in_channels must be a whole number of at least 1'),
        (dict(arch=dict(ARCH, d_conv=5)), 'd_conv of arch must be 2 to 4, got 5'),
        (dict(arch=dict(ARCH, embed_dims=0)), 'embed_dims of arch must be a whole number of at least 1, got 0'),
        (dict(arch=dict(ARCH, depths=(1, 1, 2, None))), 'depths of arch must be four whole numbers of at least 1'),
        (dict(attention='late'), 'attention must be one of'),
        (dict(attention=0), 'attention must be one of .* or a number l >= 1, got 0'),
        (dict(mixer_conv='full'), "mixer_conv must be one of .*'same', 'causal'"),
        (dict(mixer_merge='sum'), 'mixer_merge must be one of'),
        (dict(dt_init='zero'), 'dt_init must be one of'),
        (dict(attention='all', mixer_conv='causal'), "attention='all' leaves no mixer for mixer_conv: leave it out"),
        (
            dict(attention=1, dt_init='mamba', mixer_merge='gate'),
            'attention=1 leaves no mixer for mixer_merge, dt_init',
        ),
        (dict(drop_path_rate=1.0), 'drop_path_rate'),
        (dict(drop_path_rate='a'), r"drop_path_rate must be in \[0, 1\), got 'a'"),
        (dict(frozen_stages=5), 'frozen_stages must be in -1 to 4'),
        (dict(frozen_stages=None), 'frozen_stages must be in -1 to 4, got None'),
        (dict(out_indices='3'), "out_indices must be a whole number or several, got '3'"),
        (dict(out_indices=(0, 1.0)), 'out_indices must be a whole number or several'),
        (dict(fit_windows='yes'), "fit_windows must be True or False, got 'yes'"),
        (dict(mixer_symmetric='no'), "mixer_symmetric must be True or False, got 'no'"),
        (dict(scan_backend='cuda'), r"scan_backend must be None or one of \('triton', 'numba', 'torch'\), got 'cuda'"),
        (dict(arch=dict(ARCH, mlp_ratio=0.01)), 'mlp_ratio of arch must be a number that gives the MLP a width'),
        (dict(arch=dict(ARCH, layer_scale='x')), "layer_scale of arch must be a number or None, got 'x'"),
    ],
)
def test_bad_arguments(kwargs, message):
    with pytest.raises(ValueError, match=message):
        MambaVision(**{**SMALL, **kwargs})
