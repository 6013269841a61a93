"""tools/get_flops.py: counts against mmengine's counter, against arithmetic and against published figures."""

import json
from collections import Counter

import pytest
import torch
from mmengine.registry import MODELS
from torch import nn

import mmvim.registry  # noqa: F401
from mmvim.errors import InputError
from mmvim.tools import command_line, flop_counter, flops


@pytest.fixture
def run(capsys):
    """The tool in this process; returns what it prints."""

    def call(*arguments):
        command_line.run(flops, arguments)
        return capsys.readouterr().out

    return call


@pytest.mark.parametrize(
    'backbone',
    [
        dict(type='mmvim.VisionMamba', arch=dict(embed_dims=32, depth=2), cls_token=None, out_type='featmap'),
        dict(
            type='mmvim.MambaVision',
            arch=dict(embed_dims=16, stem_channels=8, depths=(1, 1, 2, 2), num_heads=(1, 2, 2, 4)),
        ),
        dict(type='mmvim.VisionTransformer', arch=dict(embed_dims=32, depth=2, num_heads=2)),
        pytest.param(dict(type='mmpretrain.SwinTransformer', arch='tiny'), marks=pytest.mark.slow),
        dict(type='mmpretrain.ResNet', depth=18),
    ],
    ids=lambda cfg: cfg['type'],
)  # fmt: skip
def test_a_count_without_values_is_mmengines(backbone):
    def build():
        return MODELS.build(dict(backbone))

    (cost,) = flop_counter.count(build, [(224, 256)])
    model = build()
    model.eval()
    with torch.no_grad():
        expected = flop_counter.analyzer(model, torch.randn(1, 3, 224, 256)).total()
    assert cost.fake
    assert cost.total == pytest.approx(expected, rel=1e-3)


def test_transformer_layers_of_pytorch_are_counted_in_evaluation_too():
    class Model(nn.Module):
        def __init__(self):
            super().__init__()
            self.layer = nn.TransformerEncoderLayer(8, 2, 16, batch_first=True)

        def forward(self, image):
            return self.layer(image.flatten(2).transpose(1, 2).repeat(1, 1, 3)[..., :8])

    (cost,) = flop_counter.count(Model, [(4, 4)])
    tokens = 16
    assert cost.flops['layer']['linear'] == tokens * (4 * 8 * 8 + 2 * 8 * 16)
    assert cost.flops['layer']['attention'] == 2 * tokens**2 * 8
    assert torch.backends.mha.get_fastpath_enabled()


def test_both_kinds_of_attention_cost_the_same():
    def build(attention):
        arch = dict(embed_dims=32, depth=2, num_heads=2)
        return lambda: MODELS.build(dict(type='mmvim.VisionTransformer', arch=arch, attention=attention))

    fused, plain = (flop_counter.count(build(kind), [(64, 64)])[0] for kind in ('sdpa', 'materialized'))
    assert fused.kinds == plain.kinds
    assert fused.kinds['attention'] == 2 * 2 * 17**2 * 32


@pytest.mark.parametrize(
    ('config', 'published', 'scan_counts'),
    [
        ('mambavision/mambavision-t_32xb128_in1k.py', 4.4, False),
        ('mambavision/mambavision-s_32xb128_in1k.py', 7.5, False),
        ('mambavision/mambavision-b_32xb128_in1k.py', 15.0, False),
        ('vim/vim-ti_8xb128_in1k.py', 1.5, True),
    ],
)
def test_published_operations(run, config, published, scan_counts, tmp_path):
    """MambaVision's papers count linear layers and convolutions; Vim's 1.5 is met with the scan."""
    run(config, '--json', tmp_path / 'cost.json')
    found = json.loads((tmp_path / 'cost.json').read_text())
    assert found['shape'] == [224, 224]
    counted = found['flops_total'] if scan_counts else found['flops_linear_and_convolution']
    assert counted / 1e9 == pytest.approx(published, rel=0.03)
    assert sum(found['flops_by_kind'].values()) == found['flops_total'] == sum(
        sum(part.values()) for part in found['flops'].values()
    )  # fmt: skip


def test_a_detector_by_part(run, tmp_path):
    """Parts add up, the second stage by its arithmetic, and the scan has the same cost for every token."""
    arguments = ('vim/cascade_mask_rcnn_vim_ti_coco.py', '--sizes', 224, 512, 2496, '--json', tmp_path / 'cost.json')
    output = run(*arguments, '--cfg-options', 'model.data_preprocessor.pad_size_divisor=32')
    found = json.loads((tmp_path / 'cost.json').read_text())
    assert found['shape'] == [1024, 1024]
    assert list(found['flops']) == ['backbone', 'neck', 'rpn_head', 'roi_head']
    assert found['flops']['backbone']['scan'] == 4096 * 24 * 2 * 384 * 16 * flop_counter.SCAN
    heads, mask = 3 * (256 * 49 * 1024 + 1024 * (81 + 4)), 256 * 256 * 28 * 28 + 256 * 80 * 28 * 28
    convolutions = 3 * 4 * 256 * 256 * 9 * 49 * 1000 + 100 * (4 * 256 * 256 * 9 * 14 * 14 + mask)
    assert found['flops']['roi_head']['linear'] == 1000 * heads
    assert found['flops']['roi_head']['convolution'] == convolutions
    assert '1000 proposals and 100 masks' in output
    first, second, third = found['sizes']
    assert [size['tokens'] for size in found['sizes']] == [14 * 14, 32 * 32, 156 * 156]
    assert first['scan_flops_per_token'] == second['scan_flops_per_token'] == third['scan_flops_per_token'] > 0
    linear = [size['flops']['backbone']['linear'] for size in (first, third)]
    assert linear[1] * 14**2 == linear[0] * 156**2


def test_attention_grows_with_the_tokens(run, tmp_path):
    run('deit/deit-ti_8xb128_in1k.py', '--sizes', 224, 448, '--json', tmp_path / 'cost.json')
    first, second = json.loads((tmp_path / 'cost.json').read_text())['sizes']
    assert second['attention_flops_per_token'] / first['attention_flops_per_token'] == pytest.approx(785 / 197)
    assert second['flops_by_kind']['linear'] / first['flops_by_kind']['linear'] == pytest.approx(785 / 197, rel=1e-2)


def test_a_segmentor(run):
    output = run('mambavision/upernet_mambavision-t_camvid-240x180.py')
    assert 'one image of 160x192 pixels (data_preprocessor.size)' in output
    assert 'auxiliary_head (' in output and 'M parameters) is for training only.' in output
    assert [
        line.split()[0] for line in output.splitlines() if line.split()[0:1] in (['backbone'], ['decode_head'])
    ] == [
        'backbone',
        'decode_head',
    ]


def test_shape_options_and_padding(run):
    options = ('--cfg-options', 'model.data_preprocessor.pad_size_divisor=64')
    output = run('demo/mask_rcnn_mambavision_shapes.py', '--shape', 100, 70, *options)
    assert 'one image of 100x70 pixels (--shape), padded to 128x128' in output


class Chooser(nn.Module):
    """A model whose way depends on a value."""

    def __init__(self):
        super().__init__()
        self.steps = nn.Linear(8, 8)

    def forward(self, image):
        return self.steps(image) if image.max() > 2 else self.steps(self.steps(image))


def test_a_model_that_looks_at_values_is_run():
    (cost,) = flop_counter.count(Chooser, [(4, 8)])
    assert not cost.fake
    assert cost.flops == {'steps': Counter(linear=2 * 3 * 4 * 8 * 8)}


def test_a_folder_without_data_counts_all_the_same(run):
    output = run('vim/cascade_mask_rcnn_vim_ti_folder.py', '--shape', 256)
    assert 'assuming 80 classes' in output


@pytest.mark.parametrize(
    ('arguments', 'message'),
    [
        (('vim/vim-tiny.py',), "config 'vim/vim-tiny.py' does not exist: did you mean"),
        (('vim/vim-ti_8xb128_in1k.py', '--shape', 0), '--shape: 0 is not positive'),
        (('vim/vim-ti_8xb128_in1k.py', '--shape', 1, 2, 3), '--shape 1 2 3: give height and width'),
        (('vim/vim-ti_8xb128_in1k.py', '--sizes', 224, -1), '--sizes: -1 is not positive'),
        (('_base_/default_runtime.py',), "default_runtime.py' has no model"),
        (('vim/vim-ti_8xb128_in1k.py', '--json', 'no/such/folder.json'), '--json no/such/folder.json: No such file'),
        (
            ('mambavision/mambavision-t_32xb128_in1k.py', '--shape', 3),
            'ImageClassifier cannot take an image of 3x3 pixels: .*each side must be at least 4',
        ),
    ],
)
def test_bad_input(arguments, message):
    with pytest.raises(InputError, match=message):
        flops.main(flops.parser().parse_args([str(argument) for argument in arguments]))


def test_the_script(run_tool, tmp_path):
    finished = run_tool('get_flops', 'vim/vim-ti_8xb128_in1k.py', '--shape', 0, cwd=tmp_path)
    assert finished.returncode == 1
    assert finished.stderr == 'error: --shape: 0 is not positive\n'
