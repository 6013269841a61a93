"""tools/verify_checkpoint.py: models and sizes are recognised, what does not fit is told, nothing is unpickled."""

import argparse
import json
from pathlib import Path

import pytest
import torch
from mmengine.registry import MODELS
from torch import nn

from mmvim.models import HierVim, MambaVision, VisionMamba
from mmvim.models.identify import identify
from mmvim.tools import command_line, verify
from mmvim.tools.verify import configs_for
from mmvim.tools.weights import backbone_weights

REPOSITORY = Path(__file__).parents[2]
DATA = REPOSITORY / 'tests' / 'data'
DEMO = 'demo/cascade_mask_rcnn_vim_ti_shapes.py'
SMALL_VIM = dict(embed_dims=16, depth=2, d_state=4)
SMALL_MAMBAVISION = dict(embed_dims=8, stem_channels=8, depths=(1, 1, 3, 2), num_heads=(1, 1, 1, 1))
SMALL_HIER_VIM = dict(embed_dims=8, depths=(1, 1, 2, 1))
SMALL_DEIT = dict(embed_dims=64, depth=2, num_heads=1)


def build(kind, **settings):
    torch.manual_seed(0)
    model = MODELS.build(dict(type=f'mmvim.{kind}', **settings))
    model.init_weights()
    return model


def classifier(model, classes=5):
    weights = dict(model.state_dict())
    return {**weights, 'head.weight': torch.randn(classes, model.out_channels[-1]), 'head.bias': torch.zeros(classes)}


@pytest.fixture
def check(tmp_path, monkeypatch, capsys):
    """Save a file, run the tool on it, and return what it prints; in a list of lines."""
    monkeypatch.chdir(tmp_path)

    def run(*arguments, save=None, error=None):
        if save is not None:
            torch.save(save, arguments[0])
        if error is None:
            command_line.run(verify, arguments)
        else:
            with pytest.raises(SystemExit) as ended:
                command_line.run(verify, arguments)
            assert ended.value.code == 1
        printed = capsys.readouterr()
        if error is not None:
            assert printed.err.strip().splitlines()[-1].startswith('error: ') and error in printed.err
        return printed.out

    return run


# ---- what is recognised


def of_size(kind, arch):
    with torch.device('meta'):
        return MODELS.build(dict(type=f'mmvim.{kind}', arch=arch))


@pytest.mark.parametrize(
    'kind, family, arch',
    [
        *[('MambaVision', 'MambaVision', arch) for arch in MambaVision.arch_zoo if len(arch) > 2],
        *[('HierVim', 'HierVim', arch) for arch in HierVim.arch_zoo if len(arch) > 2],
    ],
)
def test_every_hierarchical_size_is_recognised(kind, family, arch):
    identity = identify(of_size(kind, arch).state_dict())
    assert (identity.family, identity.size) == (family, arch)
    assert identity.backbone['out_indices'] == (0, 1, 2, 3) and identity.backbone['out_type'] == 'featmap'


def test_published_names_are_recognised():
    """From the names and shapes of the published files, without building a model."""
    keys = json.loads((DATA / 'vim_tiny_keys.json').read_text())
    weights = {name: torch.empty(shape, device='meta') for name, shape in keys.items()}
    for i in range(1, 24):
        weights |= {name.replace('layers.0.', f'layers.{i}.'): w for name, w in weights.items() if 'layers.0.' in name}
    identity = identify(weights)
    assert (identity.family, identity.size, identity.image_size) == ('Vim', 'tiny', (224, 224))
    assert identity.backbone['cls_token'] == 'middle' and identity.backbone['directions'] == 'v2'
    assert identity.backbone['out_type'] == 'cls_token'
    weights['pos_embed'] = torch.empty(1, 730, 192, device='meta')
    long = identify(weights)
    assert (long.backbone['patch_stride'], long.image_size) == (8, (224, 224))
    keys = json.loads((DATA / 'mambavision_t_keys.json').read_text())
    identity = identify({name: torch.empty(shape, device='meta') for name, shape in keys.items()})
    assert (identity.family, identity.size) == ('MambaVision', 'tiny')
    assert identity.backbone['out_type'] == 'avg_featmap' and identity.backbone['attention'] == 'last'


@pytest.mark.parametrize('size', ['tiny', 'small', 'base'])
def test_every_vim_and_deit_size_is_recognised(size):
    width, depth = VisionMamba.arch_zoo[size]['embed_dims'], VisionMamba.arch_zoo[size]['depth']
    small = build('VisionMamba', arch=dict(embed_dims=16, depth=1))
    weights = {}
    for name, value in small.state_dict().items():
        factor = width // 16
        shape = [n * factor if n in (16, 32, 64) and not (n == 16 and i) else n for i, n in enumerate(value.shape)]
        if name in ('pos_embed', 'cls_token'):
            shape = [1, value.shape[1], width]
        if 'dt_proj' in name and value.ndim == 2:
            shape = [2 * width, factor]
        copies = range(depth) if name.startswith('layers.0.') else (0,)
        weights |= {name.replace('layers.0.', f'layers.{i}.'): torch.empty(shape, device='meta') for i in copies}
    assert (identify(weights).family, identify(weights).size) == ('Vim', size)
    deit = {'patch_embed.proj.weight': torch.empty(width, 3, 16, 16), 'pos_embed': torch.empty(1, 197, width)}
    deit |= {f'blocks.{i}.attn.qkv.weight': torch.empty(1) for i in range(12)} | {'cls_token': torch.empty(1)}
    assert (identify(deit).family, identify(deit).size) == ('DeiT', f'deit-{size}')


VARIANTS = [
    ('VisionMamba', dict(arch=SMALL_VIM, cls_token=layout, out_type='avg_featmap')) for layout in VisionMamba.CLS_TOKENS
] + [
    ('VisionMamba', dict(arch=dict(SMALL_VIM, expand=1, d_conv=3, dt_rank=2), directions='v1', layer_scale_init=0.5)),
    ('VisionMamba', dict(arch=SMALL_VIM, directions='none', img_size=(96, 64), patch_size=8)),
    ('VisionMamba', dict(arch=SMALL_VIM, cls_token=None, out_type='featmap', img_size=64)),
    ('VisionMamba', dict(arch=SMALL_VIM, patch_stride=8)),
    ('MambaVision', dict(arch=SMALL_MAMBAVISION, out_type='avg_featmap')),
    ('MambaVision', dict(arch=dict(SMALL_MAMBAVISION, layer_scale=1e-5), attention='early', out_indices=(1, 2))),
    ('MambaVision', dict(arch=SMALL_MAMBAVISION, attention=2, mixer_merge='gate', mixer_symmetric=False)),
    ('MambaVision', dict(arch=SMALL_MAMBAVISION, out_type='raw', attention='none')),
    ('HierVim', dict(arch=SMALL_HIER_VIM, out_type='avg_featmap')),
    ('HierVim', dict(arch=dict(SMALL_HIER_VIM, mlp_ratio=2, d_state=4), directions='v1', out_indices=(0, 2))),
    ('VisionTransformer', dict(arch=SMALL_DEIT)),
    ('VisionTransformer', dict(arch=SMALL_DEIT, with_cls_token=False, out_type='featmap', img_size=(64, 96))),
]


@pytest.mark.parametrize('kind, settings', VARIANTS)
def test_the_model_made_for_a_file_takes_all_of_it(check, kind, settings):
    model = build(kind, **settings)
    out = check('own.pth', save={'state_dict': model.state_dict()})
    count = len([name for name in model.state_dict() if not name.endswith('num_batches_tracked')])
    tracked = len(model.state_dict()) - count
    assert f'fit: {count + tracked} (' in out
    for what in ('dropped', 'missing', 'unknown to the model', 'of another shape', 'interpolated'):
        assert f'  {what}: none' in out
    assert 'forward pass: ' in out and ', finite, ' in out


def test_a_published_classifier(check):
    model = build('VisionMamba', arch=SMALL_VIM)
    file = {'model': classifier(model), 'epoch': 299, 'args': argparse.Namespace(lr=1e-3), 'optimizer': {}}
    out = check('vim.pth', save=file)
    assert "weights are under 'model', beside epoch, args, optimizer" in out
    assert 'model: Vim, a size of its own; 2 blocks of width 16; patches of 16 pixels every 16; positions for a' in out
    assert 'assumed: the file does not tell where its class token stands' in out
    assert 'dropped: 2 (head.weight, head.bias)' in out
    assert '-> 1x16, 1x5 in' in out and 'logits of 5 classes' in out
    expected = nn.functional.linear(
        model.eval()(torch.randn(1, 3, 224, 224, generator=torch.Generator().manual_seed(0)))[0],
        file['model']['head.weight'],
    )
    assert f'{expected.mean():.3g} +- {expected.std():.3g}; the last' in out


@pytest.mark.parametrize(
    'family, settings, configs',
    [
        (
            'Vim',
            dict(kind='VisionMamba', arch='tiny'),
            (
                'vim/vim-ti_8xb128_in1k.py',
                'vim/cascade_mask_rcnn_vim_ti_coco.py',
                'vim/upernet_vim-ti_8xb4-60k_ade20k-512x512.py',
            ),
        ),
        ('Vim', dict(kind='VisionMamba', arch='tiny', patch_stride=8), ('vim/vim-ti-stride8_8xb128-30e_in1k.py',)),
        (
            'HierVim',
            dict(kind='HierVim', arch='tiny'),
            ('hier_vim/hier-vim-t_16xb64_in1k.py', 'hier_vim/mask-rcnn_hier-vim-t_fpn_1x_coco.py'),
        ),
        (
            'DeiT',
            dict(kind='VisionTransformer', arch='deit-tiny'),
            ('deit/deit-ti_8xb128_in1k.py', 'deit/mask_rcnn_deit_ti_coco.py'),
        ),
        ('Vim', dict(kind='VisionMamba', arch='small'), ('vim/cascade_mask_rcnn_vim_s_coco.py',)),
        (
            'MambaVision',
            dict(kind='MambaVision', arch='tiny'),
            (
                'mambavision/mambavision-t_32xb128_in1k.py',
                'mambavision/mask-rcnn_mambavision-t_fpn_1x_coco.py',
                'mambavision/upernet_mambavision-t_8xb2-160k_ade20k-512x512.py',
            ),
        ),
        ('MambaVision', dict(kind='MambaVision', arch='tiny2'), ('mambavision/mambavision-t2_32xb128_in1k.py',)),
    ],
)
def test_configs_to_use(family, settings, configs):
    identity = identify(build(**settings).state_dict())
    found = configs_for(identity)
    listed = [name for names in found.values() for name in names]
    assert identity.family == family and {f'configs/{name}' for name in configs} <= set(listed)
    for name in listed:
        assert (REPOSITORY / name).is_file()
    assert not [name for name in listed if '-attention-' in name or '-mixer-' in name]
    long = settings.get('patch_stride') == 8
    assert [('stride8' in name) == long for name in found.get('classification', [])].count(False) == 0
    # another size's configs are no answer
    assert not {name for name in listed if '_vim_b' in name or 'mambavision-b' in name or 'mambavision-l' in name}


# ---- fitted to a config


def test_fitted_to_a_config(check):
    published = classifier(build('VisionMamba', arch=dict(embed_dims=96, depth=4)))
    published['patch_embed.proj.weight'] = torch.randn(96, 3, 8, 8)
    out = check('vim.pth', '--config', DEMO, '--names', save={'model': published})
    assert f'fitted to VisionMamba of {DEMO}' in out
    assert 'dropped: 5 (cls_token, norm_f.weight, head.weight, head.bias, pos_embed[98])' in out
    assert 'interpolated: 1 (pos_embed from 14x14 to 16x16)' in out
    assert '128x128 pixels of noise -> 1x96x16x16' in out
    error = check('vim.pth', '--config', 'vim/cascade_mask_rcnn_vim_ti_coco.py', error='the file has embed_dims 96')
    assert 'forward pass' not in error


def test_a_whole_model_and_its_config(check, load_config):
    cfg = load_config(DEMO)
    model = verify.build_model(cfg)
    weights = model.state_dict()
    out = check('model.pth', '--config', DEMO, save={'state_dict': weights, 'meta': dict(epoch=3, iter=70)})
    others = [name for name in weights if not name.startswith('backbone.')]
    assert 'saved by mmengine (epoch 3, iter 70)' in out
    assert f'other parts of the model:\n    fit: {len(others)} (' in out
    assert f'other parts, not checked without --config: {len(others)} weights of neck, roi_head, rpn_head' in check(
        'model.pth', '--no-forward'
    )
    del weights[others[0]]
    weights['neck.extra'] = torch.zeros(1)
    torch.save({'state_dict': weights}, 'model.pth')
    check('model.pth', '--config', DEMO, error=f'1 missing in the file ({others[0]}), 1 unknown to the model (neck.ex')


def test_metadata_of_a_backbone_goes_with_it():
    model = nn.Module()
    model.backbone = build('VisionMamba', arch=SMALL_VIM, cls_token='head', img_size=(32, 80))
    weights, others = backbone_weights(model.state_dict())
    assert not others and identify(weights).image_size == (32, 80)
    assert identify(weights).backbone['cls_token'] == 'head' and not identify(weights).notes


ORIGINAL_NAME = 'vim_tiny_patch16_224_bimambav2_final_pool_mean_abs_pos_embed_with_midclstok_div2'


def test_settings_that_differ_are_told(check):
    weights = classifier(build('VisionMamba', arch=dict(embed_dims=96, depth=4)))
    weights['patch_embed.proj.weight'] = torch.randn(96, 3, 8, 8)
    file = {'model': weights, 'args': argparse.Namespace(model=ORIGINAL_NAME)}
    config = ('--config', DEMO, '--no-forward')
    assert 'setting:' not in check('vim.pth', *config, save=file)
    out = check('vim.pth', *config, '--cfg-options', 'model.backbone.rotary=both', 'model.backbone.divide_output=False')
    assert 'setting: divide_output=True in the file (by its args.model), False in the model' in out
    assert "setting: rotary=None in the file (it has no rope.freqs_cos), 'both' in the model" in out
    own = build('VisionMamba', arch=dict(embed_dims=96, depth=4), patch_size=8, rotary='hidden').state_dict()
    assert "rotary 'hidden'" in check('own.pth', '--no-forward', save=own)
    assert "setting: rotary='hidden' in the file, None in the model" in check('own.pth', *config)
    own._metadata['']['mmvim']['divide_output'] = False
    out = check(
        'own.pth', *config, save=own, error='other settings (divide_output=False in the file, True in the model'
    )
    assert 'setting: divide_output=False in the file' in out


def test_the_name_of_the_original_code_is_used(check):
    weights = classifier(build('VisionMamba', arch=SMALL_VIM))
    weights |= {f'rope.freqs_{part}': torch.ones(196, 16) for part in ('cos', 'sin')}
    name = ORIGINAL_NAME.replace('_with_midclstok_div2', '_rope_with_cls_token')
    out = check('vim.pth', '--no-forward', save={'model': weights, 'args': argparse.Namespace(model=name)})
    assert "class token: head; directions 'v2'; rotary 'hidden'" in out
    assert 'assumed' not in out and 'setting:' not in out
    out = check('vim.pth', '--no-forward', save={'model': weights, 'args': argparse.Namespace(model='mine')})
    assert "assumed: nothing from args.model='mine', which is no name of the original code" in out
    assert "assumed: the file does not tell which streams rotary embedding turns: 'both'" in out
    assert (
        'setting: args.model=' in out and 'dropped: 4 (head.weight, head.bias, rope.freqs_cos, rope.freqs_sin)' in out
    )


# ---- bad files


class Harmful:
    def __reduce__(self):
        return Path.touch, (Path('harmed'),)


def test_no_code_is_unpickled(check):
    weights = dict(build('VisionMamba', arch=SMALL_VIM).state_dict())
    check('bad.pth', save={'model': weights, 'more': Harmful()}, error='loading them could run code')
    assert not Path('harmed').exists()


def test_files_that_are_no_good(check):
    weights = dict(build('VisionMamba', arch=SMALL_VIM).state_dict())
    torch.save(weights, 'whole.pth')
    Path('half.pth').write_bytes(Path('whole.pth').read_bytes()[:5000])
    Path('empty.pth').touch()
    check('gone.pth', error="checkpoint 'gone.pth' does not exist")
    check('half.pth', error='a damaged or incomplete one')
    check('empty.pth', error="checkpoint 'empty.pth' is empty")
    check('list.pth', save=[1, 2], error="'list.pth' holds no weights")
    other = nn.Sequential(nn.Conv2d(3, 4, 3), nn.Linear(4, 4)).state_dict()
    check('other.pth', save=other, error="'other.pth' is of another model: its 4 weights (0.weight, 0.bias, 1.weight")
    del weights['layers.1.mixer.A_b_log']
    check('missing.pth', save=weights, error='1 missing in the file (layers.1.mixer.A_b_log)')
    broken = dict(torch.load('whole.pth'), **{'layers.0.mixer.D': torch.full((32,), torch.nan)})
    check('nan.pth', save=broken, error='the forward pass gives numbers that are not finite')
    shape = dict(torch.load('whole.pth'), **{'layers.1.mixer.D': torch.zeros(3)})
    check('shape.pth', save=shape, error='layers.1.mixer.D (3,) in the file, (32,) in the model')
    odd = dict(torch.load('whole.pth'), pos_embed=torch.zeros(1, 191, 16))
    check('odd.pth', save=odd, error='has 190 patch positions, which is no square grid: name the config')
    check('whole.pth', '--cfg-options', 'a=1', error='--cfg-options changes the config that --config names')
    check('whole.pth', '--config', 'gone.py', error="config 'gone.py' does not exist")


def test_a_folder(check):
    check('.', error="folder '.' holds no file that ends in .pth")
    torch.save({'model': dict(build('HierVim', arch=SMALL_HIER_VIM).state_dict())}, 'a.pth')
    Path('notes.txt').write_text('not looked at')
    out = check('.', '--no-forward')
    assert out.startswith('a.pth\n') and 'model: HierVim' in out and 'notes' not in out
    torch.save({'weight': torch.zeros(1)}, 'b.pt')
    out = check('.', '--no-forward', error="1 of 2 files in '.' do not fit: b.pt")
    assert 'model: HierVim' in out and "PROBLEM: 'b.pt' is of another model" in out


def test_the_tool_itself(tmp_path, run_tool):
    torch.save({'model': dict(build('HierVim', arch=SMALL_HIER_VIM).state_dict())}, tmp_path / 'a.pth')
    finished = run_tool('verify_checkpoint', 'a.pth', cwd=tmp_path)
    assert finished.returncode == 0, finished.stderr
    assert 'model: HierVim, a size of its own' in finished.stdout
