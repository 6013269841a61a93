"""tools/visualize_features.py: what it computes, the pictures that it writes, and errors in one line."""

from pathlib import Path

import cv2
import numpy as np
import pytest
import torch
from mmengine.registry import MODELS, init_default_scope

from mmvim.config.reading import read_config
from mmvim.models import HierVim, MambaVision, VisionMamba, VisionTransformer
from mmvim.tools import command_line, visualize
from mmvim.tools.pictures import reduce_channels
from mmvim.tools.tracing import receptive_field, scan_directions, trace
from ssm_kernels import selective_scan_fn

REPOSITORY = Path(__file__).parents[2]
DEMO = 'demo/cascade_mask_rcnn_vim_ti_shapes.py'
VIM = dict(
    arch=dict(embed_dims=16, depth=4, d_state=4), img_size=(64, 48), out_indices=(0, 1, 2, 3), out_type='featmap'
)
MAMBAVISION = dict(
    arch=dict(embed_dims=8, stem_channels=8, depths=(1, 1, 3, 2), num_heads=(1, 2, 2, 4)), window_sizes=(8, 8, 3, 2)
)


def randomly_filled(model):
    torch.manual_seed(0)
    model.init_weights()
    for name, parameter in model.named_parameters():
        if name.endswith(('A_log', 'dt_proj.bias', 'dt_proj_b.bias')):
            torch.nn.init.normal_(parameter, std=0.5)
    return model.eval()


def vim(**kwargs):
    return randomly_filled(VisionMamba(**{**VIM, 'feature_source': 'residual', **kwargs}))


@pytest.mark.parametrize('cls_token', VisionMamba.CLS_TOKENS)
@pytest.mark.parametrize('directions', VisionMamba.DIRECTIONS)
def test_features_of_vim_are_those_that_it_returns(cls_token, directions):
    out_indices = (1, 3) if directions == 'block' else (0, 1, 2, 3)
    model = vim(cls_token=cls_token, directions=directions, out_indices=out_indices)
    image = torch.randn(1, 3, 70, 48)
    with torch.no_grad():
        blocks = trace(model, image)
        assert [block.name for block in blocks] == [f'layers.{i}' for i in range(4)]
        for i, expected in zip(out_indices, model(image), strict=True):
            torch.testing.assert_close(blocks[i].features, expected[0])


@pytest.mark.parametrize(
    'model, ends',
    [
        (HierVim(dict(embed_dims=8, depths=(1, 1, 3, 2)), out_type='raw'), [0, 1, 4, 6]),
        (MambaVision(**MAMBAVISION, out_type='raw'), [0, 1, 4, 6]),
        (MambaVision(**MAMBAVISION, out_type='raw', fit_windows=True), [0, 1, 4, 6]),
    ],
    ids=['HierVim', 'MambaVision', 'fitted windows'],
)
def test_features_of_hierarchical_backbones_are_those_that_they_return(model, ends):
    randomly_filled(model)
    image = torch.randn(1, 3, 90, 130)
    with torch.no_grad():
        blocks = trace(model, image)
        for end, expected in zip(ends, model(image), strict=True):
            torch.testing.assert_close(blocks[end].features, expected[0])


@pytest.mark.parametrize('settings', [dict(), dict(with_cls_token=False, window_size=3, global_attn_indexes=(1,))])
def test_features_of_a_transformer_are_those_that_it_returns(settings):
    model = VisionTransformer(
        dict(embed_dims=32, depth=2, num_heads=2), img_size=(64, 48), out_type='featmap', out_indices=(0, 1), **settings
    )
    randomly_filled(model)
    image = torch.randn(1, 3, 70, 48)
    with torch.no_grad():
        blocks = trace(model, image)
        for block, expected in zip(blocks, model(image), strict=True):
            torch.testing.assert_close(block.features, expected[0])
            assert block.mixer is None


def traced_scans():
    image = torch.randn(1, 3, 64, 48)
    with torch.no_grad():
        for directions in ('v2', 'v1', 'none', 'block'):
            yield directions, trace(vim(directions=directions, out_indices=-1), image)[3]
        yield 'HierVim', trace(randomly_filled(HierVim(dict(embed_dims=8, depths=(1, 1, 1, 1)))), image)[2]
        yield 'MambaVision', trace(randomly_filled(MambaVision(**MAMBAVISION)), image)[2]


def test_the_decay_is_that_of_the_real_scan():
    """An impulse at one token, scanned with the block's own delta and A: what of it is in the state further on."""
    names = {}
    for case, block in traced_scans():
        names[case] = [direction.name for direction in scan_directions(block)]
        for direction in scan_directions(block):
            delta = direction.delta[-1].flip(0) if direction.backward else direction.delta[-1]
            length, channels = delta.shape
            at = length - 2
            reach = direction.reach(len(direction.delta) - 1, length - 1 - at if direction.backward else at)
            reach = reach.flip(0) if direction.backward else reach
            assert reach[:-1].isfinite().all() and reach[-1:].isnan().all()
            for start in (0, length // 2, at):
                u = torch.zeros(1, channels, at + 1)
                u[..., start] = 1
                ones = torch.ones(1, direction.A.shape[1], at + 1)
                step = delta[: at + 1].T[None].contiguous()
                _, state = selective_scan_fn(u, step, direction.A, ones, ones, return_last_state=True)
                expected = (state[0] / delta[start][:, None]).mean()
                torch.testing.assert_close(reach[start].float(), expected, rtol=1e-3, atol=1e-7, msg=case)
            one_step = direction.kept()[-1].flip(0) if direction.backward else direction.kept()[-1]
            torch.testing.assert_close(one_step[at], reach[at - 1].float(), rtol=1e-4, atol=1e-7)
    both = ['forward', 'backward']
    expected = dict(v2=both, v1=both, none=['forward'], block=['backward'], HierVim=both, MambaVision=['forward'])
    assert names == expected


def test_token_indices_with_class_tokens_and_windows():
    image = torch.randn(1, 3, 64, 48)
    token_index = {layout: trace(vim(cls_token=layout), image)[0].token_index for layout in VisionMamba.CLS_TOKENS}
    assert token_index['head'].flatten().tolist() == list(range(1, 13))
    assert token_index['double'].flatten().tolist() == list(range(1, 13))
    assert token_index['middle'].flatten().tolist() == [*range(6), *range(7, 13)]
    assert token_index[None].shape == (4, 3)
    block = trace(randomly_filled(MambaVision(**MAMBAVISION)), torch.randn(1, 3, 64, 80))[2]
    assert block.tokens.shape[:2] == (4, 9) and block.stride == 16
    assert block.token_index.tolist() == [[0, 1, 2, 9, 10], [3, 4, 5, 12, 13], [6, 7, 8, 15, 16], [18, 19, 20, 27, 28]]


def test_the_receptive_field_of_one_direction_ends_at_the_position():
    image = torch.randn(1, 3, 64, 48, requires_grad=True)
    for directions, seen in (('none', 8), ('v2', 12)):
        block = trace(vim(directions=directions, cls_token=None, out_indices=-1), image)[-1]
        field = receptive_field(block, image, 2, 1)
        patches = field.reshape(4, 16, 3, 16).amax((1, 3)).flatten()
        assert field.shape == (64, 48) and (patches > 0).tolist() == [i < seen for i in range(12)]


def test_reducing_channels():
    features = torch.randn(7, 5, 4)
    assert np.allclose(reduce_channels(features, 'mean'), features.numpy().mean(0), atol=1e-6)
    assert np.allclose(reduce_channels(features, 'max'), features.numpy().max(0))
    assert np.allclose(reduce_channels(features, 'norm'), np.linalg.norm(features.numpy(), axis=0), atol=1e-5)
    assert np.array_equal(reduce_channels(features, '6'), features[6].numpy())
    colours = reduce_channels(features, 'pca')
    assert colours.shape == (5, 4, 3) and colours.min() == 0 and colours.max() == 1
    # the first component is the direction of largest variance
    line = torch.linspace(-1, 1, 20).reshape(1, 5, 4) * torch.randn(7, 1, 1) + 3
    red = reduce_channels(line, 'pca')[..., 0].flatten()
    assert np.allclose(np.sort(red), np.linspace(0, 1, 20), atol=1e-4)


@pytest.fixture
def folder(tmp_path, monkeypatch):
    """A folder with an image of 96x64 pixels, a small config, and its backbone's and model's checkpoints."""
    rng = np.random.default_rng(0)
    image = cv2.resize(rng.integers(0, 256, (6, 4, 3), dtype=np.uint8), (64, 96), interpolation=cv2.INTER_CUBIC)
    cv2.imwrite(str(tmp_path / 'image.png'), image)
    (tmp_path / 'small.py').write_text(
        f"_base_ = '{REPOSITORY}/configs/{DEMO}'\n"
        'model = dict(backbone=dict(arch=dict(embed_dims=16, depth=2, d_state=2), img_size=64), '
        'neck=dict(in_channels=16))\n'
    )
    monkeypatch.chdir(tmp_path)
    backbone = MODELS.build(read_config('small.py').model.backbone)
    backbone.init_weights()
    weights = backbone.state_dict()
    torch.save({'model': dict(weights)}, 'published.pth')
    whole = {f'backbone.{name}': weight for name, weight in weights.items()}
    torch.save({'state_dict': {**whole, 'neck.x': torch.zeros(1)}}, 'model.pth')
    return tmp_path


def run(*arguments):
    command_line.run(visualize, arguments)


@pytest.mark.parametrize(
    'checkpoint', ['published.pth', *(pytest.param(c, marks=pytest.mark.slow) for c in ('model.pth', 'none'))]
)
def test_pictures(folder, capsys, checkpoint):
    run('image.png', 'small.py', checkpoint, '--block', 0, -1, '--channels', 'pca', '--out-dir', 'out')
    kinds = ('features', 'receptive-field', 'scan')
    expected = [f'out/image_block{i:02d}_{kind}.png' for i in (0, 1) for kind in kinds]
    assert [line for line in capsys.readouterr().out.splitlines() if line.endswith('.png')] == expected
    for path in expected:
        picture = cv2.imread(path)
        assert picture.shape[1] > 1000 and picture.std() > 10
    assert len({Path(path).read_bytes() for path in expected}) == 6


@pytest.mark.parametrize(
    'name', [DEMO, 'demo/upernet_mambavision_shapes.py', 'mambavision/mambavision-t_32xb128_in1k.py']
)
def test_the_input_is_the_one_of_the_hosts(folder, name):
    cfg = read_config(name)
    init_default_scope(cfg.default_scope)
    settings = dict(cfg.model.get('data_preprocessor') or cfg.data_preprocessor)
    settings.setdefault('type', 'ClsDataPreprocessor')
    bgr = cv2.imread('image.png')
    inputs = torch.from_numpy(bgr).permute(2, 0, 1)
    expected = MODELS.build(settings)(dict(inputs=[inputs], data_samples=None))['inputs'][..., :96, :64]
    image = visualize.normalize(visualize.read_image('image.png'), cfg)
    torch.testing.assert_close(image, expected)


def test_options(folder):
    run('image.png', 'small.py', 'none', '--only', 'scan', '--size', 32, '--out-dir', 'a', '--position', 1, 1)
    assert [path.name for path in Path('a').iterdir()] == ['image_block01_scan.png']
    run('image.png', 'demo/mask_rcnn_mambavision_shapes.py', 'none', '--block', 0, '--out-dir', 'b')
    names = {path.name for path in Path('b').iterdir()}
    assert names == {'image_block00_features.png', 'image_block00_receptive-field.png'}, 'a convolution has no scan'


@pytest.mark.parametrize(
    'arguments, message',
    [
        (('gone.png', 'small.py', 'none'), "image 'gone.png' does not exist"),
        (('small.py', 'small.py', 'none'), "image 'small.py' cannot be read"),
        (('empty.png', 'small.py', 'none'), "image 'empty.png' cannot be read"),
        (('image.png', 'gone.py', 'none'), "config 'gone.py' does not exist"),
        (('image.png', 'small.py', 'gone.pth'), "checkpoint 'gone.pth' does not exist"),
        (('image.png', 'small.py', 'empty.png'), "checkpoint 'empty.png' is empty"),
        (('image.png', 'small.py', 'other.pth'), 'this is no Vim checkpoint, it holds weight'),
        (('image.png', 'small.py', 'none', '--block', 2), '--block 2: the backbone has 2 blocks, 0 to 1'),
        (('image.png', 'small.py', 'none', '--channels', 'all'), "--channels: channels must be one of ('mean', 'max'"),
        (('image.png', 'small.py', 'none', '--channels', '16'), 'or a number from 0 to 15, got'),
        (('image.png', 'small.py', 'none', '--position', '2', '0'), 'both numbers must be within 0 and 1'),
        (('image.png', 'small.py', 'none', '--size', '0'), '--size 0: must be at least 1 pixel'),
        (
            ('image.png', 'demo/mask_rcnn_mambavision_shapes.py', 'none', '--only', 'scan', '--block', '0'),
            '--block 0 (levels.0.blocks.0) has no scan; blocks with one: 2, 3, 6',
        ),
        (
            ('image.png', 'resnet.py', 'none'),
            'the backbone of this config is ResNet; this tool knows mmvim.',
        ),
        (('image.png', 'bare.py', 'none'), 'the config has no model.backbone'),
        (
            ('image.png', 'demo/cascade_mask_rcnn_patch_embed_shapes.py', 'none'),
            'the backbone of this config has no blocks',
        ),
    ],
)
def test_wrong_input_is_told_in_one_line(folder, capsys, arguments, message):
    Path('empty.png').touch()
    torch.save({'weight': torch.zeros(1)}, 'other.pth')
    Path('resnet.py').write_text("default_scope = 'mmdet'\nmodel = dict(backbone=dict(type='ResNet', depth=18))")
    Path('bare.py').write_text('optim_wrapper = dict()')
    with pytest.raises(SystemExit) as ended:
        run(*arguments)
    assert ended.value.code == 1
    error = capsys.readouterr().err.strip().splitlines()[-1]
    assert error.startswith('error: ') and message in error


def test_the_tool_itself(folder, run_tool):
    arguments = ('image.png', 'small.py', 'model.pth', '--device', 'cpu')
    finished = run_tool('visualize_features', *arguments, cwd=Path.cwd())
    assert finished.returncode == 0, finished.stderr
    assert Path('pictures/image_block01_scan.png').is_file()
