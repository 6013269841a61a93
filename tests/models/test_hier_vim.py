"""HierVim: sizes, outputs, options, gradients, initialisation, freezing, loading, bad arguments."""

import itertools

import pytest
import torch
import torch.nn.functional as F
from mmengine.optim import build_optim_wrapper
from mmengine.registry import MODELS
from torch import nn

import mmvim  # noqa: F401
from mmvim.errors import CheckpointError
from mmvim.models import HierVim
from mmvim.models.layers import VimMixer

ARCH = dict(embed_dims=16, depths=(1, 1, 3, 2))


def build(**kwargs):
    model = MODELS.build(dict(type='mmvim.HierVim', **{'arch': ARCH, **kwargs}))
    model.init_weights()
    return model


PUBLISHED = {'t': 30e6, 'tiny': 30e6, 's': 50e6, 'small': 50e6, 'b': 89e6, 'base': 89e6}


@pytest.mark.parametrize('arch', sorted(HierVim.arch_zoo))
def test_arch_zoo_has_the_paper_s_parameters_within_a_tenth(arch):
    with torch.device('meta'):
        model = MODELS.build(dict(type='mmvim.HierVim', arch=arch, out_type='avg_featmap'))
        head = nn.Linear(model.out_channels[-1], 1000)
    count = sum(p.numel() for module in (model, head) for p in module.parameters())
    assert count == pytest.approx(PUBLISHED[arch], rel=0.1)
    settings = HierVim.arch_zoo[arch]
    assert [len(stage.blocks) for stage in model.stages] == list(settings['depths'])
    widths = [stage.blocks[0].norm1.normalized_shape[0] for stage in model.stages]
    assert widths == [settings['embed_dims'] * 2**i for i in range(4)]


@pytest.mark.parametrize('size', [(1, 1), (4, 4), (5, 130), (33, 31), (64, 96), (97, 43)])
def test_any_image_size(size):
    model = build().eval()
    maps = model(torch.randn(2, 3, *size))
    assert len(maps) == 4
    assert model.out_channels == (16, 32, 64, 128) and model.out_strides == (4, 8, 16, 32)
    for i, feature_map in enumerate(maps):
        sides = [-(-side // model.out_strides[i]) for side in size]
        assert tuple(feature_map.shape) == (2, model.out_channels[i], *sides)
        assert feature_map.isfinite().all()


@pytest.mark.parametrize(
    'out_type, directions', [*itertools.product(HierVim.OUT_TYPES, ['v2']), ('raw', 'v1'), ('raw', 'none')]
)
def test_every_parameter_gets_a_gradient_on_a_non_square_image(out_type, directions):
    model = build(out_type=out_type, directions=directions, drop_path_rate=0.2).eval()
    outputs = model(torch.randn(2, 3, 48, 80))
    sum((out * torch.randn_like(out)).sum() for out in outputs).backward()
    missing = [n for n, p in model.named_parameters() if p.grad is None or not p.grad.abs().sum() > 0]
    assert not missing


def test_every_output_depends_on_every_pixel_of_the_map_before():
    """The scan is over all tokens of a stage in both directions; with one direction, only over those before."""
    model = build(out_type='raw', out_indices=0).eval()
    forward = build(out_type='raw', out_indices=0, directions='none').eval()
    for network, seen in ((model, 24), (forward, 15)):
        image = torch.randn(1, 3, 16, 24, requires_grad=True)
        network(image)[0][0, :, 2, 2].sum().backward()
        patches = F.avg_pool2d(image.grad.abs().sum(1), 4)
        assert (patches > 0).sum() == seen
        assert (patches.flatten()[:15] > 0).all()


def test_outputs():
    image = torch.randn(2, 3, 64, 48)
    torch.manual_seed(0)
    raw, normed, pooled = (build(out_type=t).eval() for t in ('raw', 'featmap', 'avg_featmap'))
    normed.load_state_dict(raw.state_dict(), strict=False)
    pooled.load_state_dict(raw.state_dict(), strict=False)
    for i, (a, b) in enumerate(zip(raw(image), normed(image), strict=True)):
        expected = F.layer_norm(a.movedim(1, -1), a.shape[1:2], eps=1e-5).movedim(-1, 1)
        torch.testing.assert_close(b, expected, msg=f'stage {i}')
    torch.testing.assert_close(pooled(image)[0], normed(image)[-1].mean((2, 3)))


def test_stages_behind_the_last_output_are_not_built():
    model = build(out_indices=(1, -2))
    assert model.out_indices == (1, 2) and len(model.stages) == 3
    assert model.out_channels == (32, 64) and model.out_strides == (8, 16)
    assert {name for name, _ in model.named_children() if 'norm' in name} == {'outnorm1', 'outnorm2'}
    assert not hasattr(model.stages[2], 'downsample')
    assert [tuple(out.shape) for out in model(torch.randn(1, 3, 64, 64))] == [(1, 32, 8, 8), (1, 64, 4, 4)]


OPTIONS = {
    'undivided': dict(divide_output=False),
    'v1': dict(directions='v1'),
    'none': dict(directions='none'),
    'patch size': dict(patch_size=8),
    'mlp': dict(arch=dict(ARCH, mlp_ratio=2)),
    'state size': dict(arch=dict(ARCH, d_state=4)),
    'width of the convolution': dict(arch=dict(ARCH, d_conv=3)),
    'expand': dict(arch=dict(ARCH, expand=1)),
    'rank': dict(arch=dict(ARCH, dt_rank=3)),
    'depths': dict(arch=dict(ARCH, depths=(1, 1, 2, 2))),
}


def test_every_option_changes_the_output(fill_parameters, reference_input):
    image = reference_input(0, 1, 3, 64, 80)
    outputs = {'default': fill_parameters(build(), 7)(image)[-1]}
    for name, option in OPTIONS.items():
        outputs[name] = fill_parameters(build(**option), 7)(image)[-1]
    for a, b in itertools.combinations(outputs, 2):
        same_shape = outputs[a].shape == outputs[b].shape
        assert not (same_shape and torch.allclose(outputs[a], outputs[b], rtol=1e-3)), f'{a} and {b} give the same'


def test_gradients_of_a_padded_image_stay_moderate():
    """Zeros, as hosts pad with, must not stay exactly zero: a norm of such tokens multiplies gradients by 316."""
    torch.manual_seed(0)
    model = build(arch=dict(ARCH, embed_dims=32, depths=(2, 2, 5, 2)))
    image = torch.randn(1, 3, 64, 64)
    norms = []
    for padded in (False, True):
        model.zero_grad()
        outputs = model(F.pad(image, (0, 64)) if padded else image)
        sum((out * torch.randn_like(out)).mean() for out in outputs).backward()
        norms.append(nn.utils.get_total_norm([p.grad for p in model.parameters()]))
    assert norms[1] < 3 * norms[0]


def test_stochastic_depth():
    model = build(drop_path_rate=0.6)
    blocks = [block for stage in model.stages for block in stage.blocks]
    assert [getattr(b.drop_path, 'drop_prob', 0.0) for b in blocks] == pytest.approx([0.1 * i for i in range(7)])
    assert blocks[4].ffn.dropout_layer.drop_prob == pytest.approx(0.4)
    image = torch.randn(8, 3, 32, 32)
    assert not torch.equal(model.train()(image)[-1], model(image)[-1])
    model.eval()
    assert torch.equal(model(image)[-1], model(image)[-1])


def test_checkpointing_changes_no_gradient():
    image = torch.randn(2, 3, 64, 48)
    gradients = []
    for with_cp in (False, True):
        torch.manual_seed(0)
        model = build(with_cp=with_cp, drop_path_rate=0.3).train()
        torch.manual_seed(1)
        sum(out.square().mean() for out in model(image)).backward()
        gradients.append({name: p.grad for name, p in model.named_parameters()})
    for name, gradient in gradients[0].items():
        torch.testing.assert_close(gradient, gradients[1][name], msg=name)


@pytest.mark.parametrize('autocast', [False, True])
def test_bfloat16(autocast):
    torch.manual_seed(0)
    model = build().eval()
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
    model = build(arch=dict(ARCH, embed_dims=32))
    block = model.stages[3].blocks[0]
    for linear in (block.ffn.layers[0][0], block.ffn.layers[1], model.stages[2].downsample.reduction):
        assert abs(linear.weight.std() - 0.02) < 1e-3
        assert linear.bias is None or linear.bias.eq(0).all()
    dt = F.softplus(block.mixer.dt_proj.bias)
    assert 1e-3 * 0.99 <= dt.min() and dt.max() <= 1e-1 * 1.01
    # Kaiming-uniform with a = sqrt 5 has the bound fan_in ** -0.5; the network has 7 blocks
    bound = (512 * 7) ** -0.5
    assert 0.98 * bound < block.mixer.out_proj.weight.abs().max() <= bound
    # PyTorch's own initialisation: uniform, to 48 ** -0.5
    assert abs(model.patch_embed.projection.weight.std() - (3 * 48) ** -0.5) < 0.005
    assert model.patch_embed.projection.bias.abs().max() > 0.01
    assert not [n for n, p in model.named_parameters() if not p.isfinite().all()]


@pytest.mark.parametrize(
    ('frozen', 'trained'),
    [
        (-1, {'patch_embed', 'stages.0', 'stages.1', 'stages.2', 'stages.3'}),
        (0, {'stages.0', 'stages.1', 'stages.2', 'stages.3'}),
        (2, {'stages.2', 'stages.3'}),
        (4, set()),
    ],
)
def test_frozen_stages(frozen, trained):
    model = build(frozen_stages=frozen, out_type='raw', drop_path_rate=0.1).train()
    names = {name for name, p in model.named_parameters() if p.requires_grad}
    assert {'.'.join(name.split('.')[: 2 if name.startswith('stages') else 1]) for name in names} == trained
    assert [stage.training for stage in model.stages] == [f'stages.{i}' in trained for i in range(4)]


def test_no_weight_decay_set():
    model = build()
    assert {name.rpartition('.')[2] for name in model.no_weight_decay()} == {'A_log', 'A_b_log', 'D', 'D_b'}
    assert len(model.no_weight_decay()) == 4 * sum(isinstance(m, VimMixer) for m in model.modules())


@pytest.mark.parametrize(
    ('name', 'depth'),
    [
        ('patch_embed.projection.weight', 0),
        ('stages.0.blocks.0.norm1.weight', 1),
        ('stages.0.downsample.reduction.weight', 1),
        ('stages.2.blocks.0.mixer.A_log', 3),
        ('stages.2.blocks.2.ffn.layers.1.bias', 5),
        ('stages.2.downsample.norm.weight', 5),
        ('stages.3.blocks.1.mixer.dt_proj_b.bias', 7),
        ('outnorm3.weight', 8),
    ],
)
def test_layer_depths(name, depth):
    model = build()
    assert name in dict(model.named_parameters())
    assert model.get_layer_depth(name) == (depth, 9)
    assert model.get_layer_depth(f'backbone.{name}', 'backbone.') == (depth, 9)
    assert model.get_layer_depth(name, 'backbone.') == (8, 9)


def test_layer_decay_reaches_the_optimiser():
    model = nn.Module()
    model.backbone = build()
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
    assert found['backbone.patch_embed.projection.weight'] == (0.5**8, 0.05)
    assert found['backbone.patch_embed.norm.weight'] == (0.5**8, 0)
    assert found['backbone.stages.2.blocks.0.mixer.A_log'] == (0.5**5, 0)
    assert found['backbone.outnorm0.weight'] == (1.0, 0)


def test_weights_of_a_classifier_start_a_dense_backbone(tmp_path):
    torch.manual_seed(0)
    trained = build(out_type='avg_featmap')
    weights = {f'backbone.{name}': value for name, value in trained.state_dict().items()}
    torch.save({'state_dict': {**weights, 'head.fc.weight': torch.zeros(3, 128)}}, tmp_path / 'classifier.pth')
    init_cfg = dict(type='Pretrained', checkpoint=str(tmp_path / 'classifier.pth'))
    image = torch.randn(1, 3, 40, 56)
    for out_indices in ((0, 1, 2, 3), (1, 2)):
        dense = build(init_cfg=init_cfg, out_indices=out_indices, out_type='raw').eval()
        expected = build(out_type='raw', out_indices=out_indices).eval()
        expected.load_state_dict(trained.state_dict(), strict=False)
        for a, b in zip(dense(image), expected(image), strict=True):
            assert torch.equal(a, b)
    for arch, message in (
        (dict(ARCH, depths=(1, 1, 3, 1)), r'the file has depths \(1, 1, 3, 2\), the model \(1, 1, 3, 1\)'),
        (dict(ARCH, d_state=8), 'the file has d_state 16, the model 8: set d_state=16'),
    ):
        with pytest.raises(CheckpointError, match=message):
            build(arch=arch, init_cfg=init_cfg)
    torch.save({'weight': torch.zeros(1)}, tmp_path / 'other.pth')
    with pytest.raises(CheckpointError, match='this is no HierVim checkpoint, it holds weight'):
        build(init_cfg=dict(type='Pretrained', checkpoint=str(tmp_path / 'other.pth')))


@pytest.mark.parametrize(
    ('kwargs', 'message'),
    [
        (dict(arch='huge'), 'arch must be one of'),
        (dict(arch=dict(embed_dims=16)), r"dict with \['depths', 'embed_dims'\]"),
        (dict(arch=dict(ARCH, depths=(1, 2, 3))), 'depths of arch must be four whole numbers of at least 1'),
        (dict(arch=dict(ARCH, depths=(1, 2, 3, 0))), 'depths of arch must be four whole numbers of at least 1'),
        (dict(patch_size=0), 'patch_size must be a whole number of at least 1'),
        (dict(in_channels=0), 'in_channels must be a whole number of at least 1'),
        (dict(arch=dict(ARCH, depths=(1, 2, 3, 2.0))), 'depths of arch must be four whole numbers of at least 1'),
        (dict(arch=dict(ARCH, d_conv=5)), 'd_conv of arch must be 2 to 4, got 5'),
        (dict(arch=dict(ARCH, embed_dims=0)), 'embed_dims of arch must be a whole number of at least 1, got 0'),
        (dict(out_type='tokens'), 'out_type must be one of'),
        (dict(out_indices=(4,)), 'out_indices must rise within 0 to 3'),
        (dict(out_indices=(2, 1)), 'out_indices must rise'),
        (dict(out_indices=()), 'out_indices must rise'),
        (dict(out_type='avg_featmap', out_indices=(2,)), r"'avg_featmap' is of the last stage: set out_indices=\(3,\)"),
        (dict(directions='block'), 'directions must be one of'),
        (dict(drop_path_rate=1.0), 'drop_path_rate'),
        (dict(with_cp='no'), "with_cp must be True or False, got 'no'"),
        (dict(frozen_stages=None), 'frozen_stages must be in -1 to .*, got None'),
        (dict(out_indices='1'), "out_indices must be a whole number or several, got '1'"),
        (dict(frozen_stages=5), 'frozen_stages must be in -1 to 4'),
    ],
)
def test_bad_arguments(kwargs, message):
    with pytest.raises(ValueError, match=message):
        HierVim(**{'arch': ARCH, **kwargs})
