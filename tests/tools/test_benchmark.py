"""tools/benchmark.py: real sweeps of small models."""

import csv
import json
import subprocess

import pytest
import torch

from mmvim import machine
from mmvim.errors import ConfigError, InputError
from mmvim.tools import benchmark

CONFIG = """
model = dict(
    backbone=dict(type='mmvim.{kind}', arch={arch}, out_type='featmap', {options}),
    neck=dict(type='mmvim.SimpleFPN', in_channels=32, out_channels=16, num_outs=5),
)
"""


@pytest.fixture
def configs(tmp_path):
    """Two small plain backbones with a pyramid."""
    vim, deit = tmp_path / 'small_vim.py', tmp_path / 'small_deit.py'
    vim.write_text(CONFIG.format(kind='VisionMamba', arch=dict(embed_dims=32, depth=2), options='cls_token=None'))
    arch = dict(embed_dims=32, depth=2, num_heads=2)
    deit.write_text(CONFIG.format(kind='VisionTransformer', arch=arch, options='with_cls_token=False'))
    return [str(vim), str(deit)]


def sweep(*arguments):
    return benchmark.Sweep(benchmark.parser().parse_args([str(a) for a in arguments]))


def watch(monkeypatch, see):
    """What `see` tells about every call of the first convolution of the models built from now on."""
    seen, build = set(), benchmark.build

    def watched(*args):
        model = build(*args)
        first = next(module for module in model.modules() if isinstance(module, torch.nn.Conv2d))
        first.register_forward_hook(lambda module, args, y: seen.add(see(module, y)))
        return model

    monkeypatch.setattr(benchmark, 'build', watched)
    return seen


def test_rows_files_and_plots(configs, tmp_path, capsys):
    out = tmp_path / 'out'
    arguments = [*configs, '--resolutions', 32, 48, '--batch-sizes', 2, '--fpn', 'both', '--repeats', 2, '--out', out]
    benchmark.main(benchmark.parser().parse_args([str(a) for a in (*arguments, '--no-memory')]))
    rows = json.loads((out / 'benchmark.json').read_text())
    assert {(r['model'], r['resolution'], r['fpn']) for r in rows} == {
        (model, size, fpn) for model in ('small_vim', 'small_deit (sdpa)') for size in (32, 48) for fpn in (False, True)
    }
    for row in rows:
        assert 0 < row['fastest_ms'] <= row['latency_ms'] <= row['slowest_ms']
        assert row['images_per_second'] == pytest.approx(2e3 / row['latency_ms'])
        assert (
            row['baseline'] == 'small_vim' and {'device', 'threads', 'torch', 'commit', 'dtype', 'mode'} <= row.keys()
        )
        assert (row['speed_ratio'] == 1) == (row['model'] == 'small_vim')
    with open(out / 'benchmark.csv') as file:
        assert len(list(csv.DictReader(file))) == 8
    assert (out / 'speed.png').read_bytes().startswith(b'\x89PNG') and '<svg' in (out / 'speed.svg').read_text()
    printed = capsys.readouterr().out
    assert 'times the speed of small_vim' in printed
    assert printed.endswith('benchmark.json, benchmark.csv, speed.png, speed.svg\n')


def test_curves_leave_out_what_was_not_measured():
    def row(resolution, fpn=False, batch=1, model='a', **values):
        return dict(resolution=resolution, fpn=fpn, batch_size=batch, model=model, **values)

    rows = [
        row(512, memory_mib=30.0, memory_above_px=224, images_per_second=4.0),
        row(224, memory_mib=1.0, memory_above_px=224, images_per_second=9.0),
        row(512, True, memory_mib=50.0, memory_above_px=0),
        row(224, True, memory_mib=20.0, memory_above_px=0),
        row(512, model='b', memory_mib=None, images_per_second=None, error='out of memory', memory_above_px=224),
        row(512, batch=2, memory_mib=-0.5, images_per_second=5.0, memory_above_px=224),
    ]
    assert benchmark.curves(rows, 'memory_mib') == {
        ('a', False, 1): [(512, 30.0)],
        ('a', True, 1): [(224, 20.0), (512, 50.0)],
    }
    assert benchmark.curves(rows, 'images_per_second') == {
        ('a', False, 1): [(224, 9.0), (512, 4.0)],
        ('a', False, 2): [(512, 5.0)],
    }


@pytest.mark.slow
def test_a_broken_sweep_goes_on(configs, tmp_path):
    out = tmp_path / 'out'
    arguments = [*configs, '--resolutions', 32, 48, '--repeats', 1, '--no-memory', '--out', out]
    whole = sweep(*arguments).run()
    (out / 'benchmark.json').write_text(json.dumps(whole[:2]))
    with pytest.raises(InputError, match='--resume'):
        sweep(*arguments)
    again = sweep(*arguments, '--resume').run()
    assert again[:2] == whole[:2]
    assert [(r['model'], r['resolution']) for r in again] == [(r['model'], r['resolution']) for r in whole]


@pytest.mark.slow
@pytest.mark.parametrize(
    'change',
    [
        ['--no-autocast'],
        *(pytest.param(x, marks=pytest.mark.slow) for x in (['--warmup', 2], ['--dtype', 'bfloat16'], ['--train'])),
        'config',
        'unfinished',
    ],
)
def test_other_settings_are_measured_anew(configs, tmp_path, change):
    out = tmp_path / 'out'
    arguments = [configs[0], '--resolutions', 32, 32, '--repeats', 1, '--no-memory', '--out', out]
    (first,) = sweep(*arguments).run()
    arguments.append('--resume')
    if change == 'config':
        (tmp_path / 'small_vim.py').write_text(
            (tmp_path / 'small_vim.py').read_text().replace("'depth': 2", "'depth': 1")
        )
    elif change == 'unfinished':
        (out / 'benchmark.json').write_text(json.dumps([first | dict(latency_ms=None)]))
    else:
        arguments += change
    again = sweep(*arguments)
    rows = again.run()
    assert again.present(rows) == rows[-1:] and rows[-1]['latency_ms'] != first['latency_ms']
    assert len(rows) == 2 if isinstance(change, list) else len(rows) == 1
    assert sweep(*arguments).run()[-1]['latency_ms'] == rows[-1]['latency_ms']


@pytest.mark.slow
def test_memory_is_measured_after_a_run_without(configs, tmp_path):
    arguments = [configs[0], '--resolutions', 32, '--repeats', 1, '--out', tmp_path / 'out']
    (row,) = sweep(*arguments, '--no-memory').run()
    assert 'memory_mib' not in row
    (row,) = sweep(*arguments, '--resume').run()
    assert row['memory_mib'] is not None


@pytest.mark.parametrize('text', ['{}', '3', '[3]', '[{"model": "x"}]', '[{"model"'])
def test_rows_that_cannot_be_read(configs, tmp_path, text):
    (tmp_path / 'benchmark.json').write_text(text)
    with pytest.raises(InputError, match=r'benchmark\.json holds no rows of this tool .* remove it'):
        sweep(configs[0], '--resolutions', 32, '--resume', '--out', tmp_path)


def test_out_that_is_a_file(configs, tmp_path):
    with pytest.raises(InputError, match=r'--out .*small_vim\.py/a: .*small_vim\.py is a file'):
        sweep(configs[0], '--resolutions', 32, '--out', tmp_path / 'small_vim.py' / 'a')


def test_ratios_are_those_of_the_baseline_in_the_cell():
    def row(model, resolution=512, **values):
        return dict(model=model, resolution=resolution, batch_size=1, fpn=False, **values)

    rows = [
        row('a', latency_ms=2.0, memory_mib=10.0, memory_above_px=224, speed_ratio=7.0, memory_ratio=7.0),
        row('b', latency_ms=1.0, memory_mib=30.0, memory_above_px=224, baseline='a'),
        row('b', 640, latency_ms=1.0, memory_mib=30.0, memory_above_px=224, speed_ratio=7.0, memory_ratio=7.0),
        row('b', dtype='float16', latency_ms=1.0, speed_ratio=7.0),
        row('a', 224, latency_ms=1.0, memory_mib=2.0, memory_above_px=224),
        row('b', 224, latency_ms=1.0, memory_mib=1.0, memory_above_px=224),
    ]
    found = benchmark.add_ratios(rows, 'a')
    assert [(r.get('speed_ratio'), r.get('memory_ratio')) for r in found] == [
        (1, 1), (2, 3), (None, None), (None, None), (1, None), (1, None),
    ]  # fmt: skip
    assert {r['baseline'] for r in found} == {'a'}


def test_training_in_bfloat16(configs, tmp_path, monkeypatch):
    seen = watch(monkeypatch, lambda module, y: (module.weight.dtype, y.dtype))
    monkeypatch.setattr(benchmark.Sweep, '_can_take', lambda *args: None)
    arguments = ['--resolutions', 32, '--repeats', 1, '--no-memory', '--train', '--dtype', 'bfloat16']
    (row,) = sweep(configs[0], *arguments, '--out', tmp_path / 'out').run()
    assert row['mode'] == 'training' and row['dtype'] == 'bfloat16' and row['latency_ms'] > 0
    assert seen == {(torch.float32, torch.bfloat16)}  # autocast, with parameters in float32


@pytest.mark.slow
def test_memory_of_a_process_of_its_own(configs, tmp_path, monkeypatch):
    commands, run = [], subprocess.run

    def kept(command, *args, **kwargs):
        commands.append(' '.join(command))
        return run(command, *args, **kwargs)

    monkeypatch.setattr(subprocess, 'run', kept)
    arguments = ['--resolutions', 768, '--repeats', 1, '--attention', 'materialized']
    (row,) = sweep(configs[1], *arguments, '--device', 'cpu', '--out', tmp_path / 'out').run()
    assert '--device cpu' in commands[-1]  # the default would be a GPU, if there is one
    matrix = 2 * (768 // 16) ** 4 * 4 / 2**20  # of two heads in float32, 40.5 MiB
    assert matrix < row['memory_mib'] < 3 * matrix  # scores and their softmax


def test_memory_that_does_not_suffice_is_recorded(configs, tmp_path, monkeypatch):
    def refuse(*args):
        raise RuntimeError("[enforce fail] DefaultCPUAllocator: can't allocate memory: you tried to allocate 1 bytes")

    monkeypatch.setattr(benchmark, 'runner', lambda *args: refuse)
    (row,) = sweep(configs[0], '--resolutions', 32, '--no-memory', '--out', tmp_path / 'out').run()
    assert row['error'] == 'out of memory' and 'latency_ms' not in row


def test_memory_that_does_not_suffice_later_leaves_the_other_models(configs, tmp_path, monkeypatch):
    runner = benchmark.runner

    def refusing(model, *args):
        call, calls = runner(model, *args), []

        def third_fails():
            calls.append(1)
            if type(model).__name__ == 'VisionMamba' and len(calls) == 3:
                raise RuntimeError("DefaultCPUAllocator: can't allocate memory")
            call()

        return third_fails

    monkeypatch.setattr(benchmark, 'runner', refusing)
    arguments = ['--resolutions', 32, '--repeats', 3, '--no-memory', '--out', tmp_path / 'out']
    vim, deit = sweep(*configs, *arguments).run()
    assert vim['error'] == 'out of memory' and 'latency_ms' not in vim
    assert deit['error'] is None and deit['latency_ms'] > 0


def test_progress_counts_work(configs, tmp_path, capsys):
    arguments = ['--resolutions', 32, 320, '--repeats', 1, '--no-memory', '--out', tmp_path / 'out']
    sweep(configs[1], *arguments).run()
    assert '] 2/105,' in capsys.readouterr().out  # thousands of pixels


def test_commit_is_that_of_the_own_checkout(tmp_path):
    def git(*arguments):
        subprocess.run(['git', '-c', 'user.name=a', '-c', 'user.email=a', *arguments], cwd=tmp_path, check=True)

    git('init', '-q')
    git('commit', '-q', '--allow-empty', '-m', 'first')
    (tmp_path / 'site-packages').mkdir()
    assert machine._commit(tmp_path)
    assert machine._commit(tmp_path / 'site-packages') == ''


def test_both_kinds_of_attention_by_name(tmp_path):
    arguments = ['--attention', 'both', '--baseline', 'deit-tiny', '--resolutions', 32, '--out', tmp_path / 'out']
    found = sweep('vim-tiny', 'deit-tiny', *arguments)
    assert list(found.models) == ['vim-tiny', 'deit-tiny (sdpa)', 'deit-tiny (materialized)']
    assert found.baseline == 'deit-tiny (sdpa)'


def test_labels_tell_models_apart(configs, tmp_path):
    def labels(*arguments):
        return list(sweep(*arguments, '--resolutions', 32, '--out', tmp_path / 'out').models)

    vim, deit = configs
    kinds = [f'{deit}:attention={kind}' for kind in ('sdpa', 'materialized')]
    assert labels(deit, '--attention', 'both') == ['small_deit (sdpa)', 'small_deit (materialized)']
    assert labels(*kinds, '--attention', 'both') == [
        'small_deit:attention=sdpa',
        'small_deit:attention=materialized',
    ]
    other = tmp_path / 'other' / 'small_vim.py'
    other.parent.mkdir()
    other.write_text((tmp_path / 'small_vim.py').read_text())
    assert labels(vim, other, vim) == ['small_vim']
    other.write_text(other.read_text().replace("'depth': 2", "'depth': 1"))
    with pytest.raises(InputError, match="would both be called 'small_vim'"):
        labels(vim, other)


@pytest.mark.parametrize(
    ('arguments', 'message'),
    [
        (['vim-huge'], "unknown model 'vim-huge': give the path of a config .* vim-tiny"),
        (['vim-tiny', '--device', 'cuda:7'], '--device cuda:7: '),
        (['vim-tiny', '--device', 'gpu'], '--device gpu: '),
        (['vim-tiny', '--resolutions', '0'], '--resolutions: 0 is not positive'),
        (['vim-tiny', '--batch-sizes', '-1'], '--batch-sizes: -1 is not positive'),
        (['vim-tiny', '--baseline', 'deit-tiny'], '--baseline deit-tiny: not one of the measured models vim-tiny'),
        (['vim-tiny', '--repeats', '0'], '--repeats: 0 is not positive'),
        (['vim-tiny', '--warmup', '-1'], '--warmup: -1 is not zero or more'),
        (['vim-tiny', '--threads', '0'], '--threads: 0 is not positive'),
        (['vim-tiny', '--threads', '-1'], '--threads: -1 is not positive'),
        (['vim-tiny:depth=3'], 'VisionMamba at 224 px cannot be built: .*depth'),
        (['vim-tiny:depth'], "'depth' is not KEY=VALUE"),
        (['mmdet.ResNet:depth=18,out_indices=(2'], 'brackets of .* do not match'),
        (['mmdet'], "unknown model 'mmdet'"),
        (['mmdet::no/such.py'], "config 'mmdet::no/such.py' cannot be read: .*check host and path"),
        (['mmpretrain.VisionTransformer:arch=foo'], 'VisionTransformer at 224 px cannot be built: .*foo'),
        (['mmpretrain.MixMIMTransformer', '--resolutions', '224', '256'], 'MixMIMTransformer.* of 256 px: '),
        (['mmpretrain.MlpMixer:arch=small,img_size=256', '--resolutions', '256'], r'of 224 px: .*\(.* --no-memory\)'),
        (['vim-tiny:out_type=avg_featmap', '--fpn', 'yes'], 'no maps for --fpn'),
    ],
)
def test_bad_input_ends_before_anything_is_measured(arguments, message, tmp_path):
    with pytest.raises(InputError, match=message):
        sweep(*arguments, '--out', tmp_path / 'out')
    assert not (tmp_path / 'out').exists()


def test_sizes_are_tried_without_computing(configs, tmp_path, monkeypatch):
    seen = watch(monkeypatch, lambda module, y: (type(y).__name__, *y.shape[2:]))
    sweep(*configs, '--no-memory', '--fpn', 'both', '--resolutions', 32, 2048, '--out', tmp_path / 'out')
    assert seen == {('FakeTensor', 2, 2), ('FakeTensor', 128, 128)}


def test_a_model_that_looks_at_values_is_tried_with_values(configs, tmp_path, monkeypatch):
    def look(module, y):
        return (type(y).__name__, bool(y.sum() < 1e9), *y.shape[2:])

    seen = watch(monkeypatch, look)
    sweep(configs[0], '--no-memory', '--resolutions', 32, 64, '--out', tmp_path / 'out')
    assert seen == {('Tensor', True, 2, 2), ('Tensor', True, 4, 4)}


def test_configs_that_cannot_be_read(tmp_path):
    broken = tmp_path / 'broken.py'
    broken.write_text('model = dict(\n')
    with pytest.raises(ConfigError, match=r"broken\.py', line 1"):
        sweep(broken, '--out', tmp_path / 'out')
    broken.write_text('model = dict(head=dict(type="A"))\n')
    with pytest.raises(ConfigError, match=r'broken\.py: its model has no backbone'):
        sweep(broken, '--out', tmp_path / 'out')


@pytest.mark.parametrize('config', ['cascade_mask_rcnn_vim_ti_folder', 'upernet_vim-ti_folder'])
def test_config_whose_data_is_not_here(config, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    label, backbone, *_ = benchmark.model_config(f'vim/{config}.py', 'sdpa')
    assert (label, backbone['type']) == (config, 'mmvim.VisionMamba')


def test_config_with_classes_as_types(tmp_path):
    config = tmp_path / 'lazy.py'
    config.write_text(
        'from mmengine.config import read_base\n'
        'from mmvim.models.backbones import VisionTransformer\n'
        'with read_base():\n    from .base import *\n'
        "backbone = dict(type=VisionTransformer, arch=dict(embed_dims=32, depth=2, num_heads=2), out_type='featmap')\n"
        'model = dict(backbone=backbone)\n'
    )
    (tmp_path / 'base.py').write_text('')
    arguments = ['--resolutions', 32, '--repeats', 1, '--no-memory', '--fpn', 'yes', '--out', tmp_path / 'out']
    (row,) = sweep(f'{config}:with_cls_token=False', *arguments).run()
    assert row['model'] == 'lazy:with_cls_token=False (sdpa)' and row['latency_ms'] > 0


def test_config_of_a_host_and_neck_of_several_parts():
    label, backbone, neck, scope = benchmark.model_config('mmdet::dyhead/atss_r50_fpn_dyhead_1x_coco.py', 'sdpa')
    assert (label, backbone['type'], scope) == ('atss_r50_fpn_dyhead_1x_coco', 'ResNet', 'mmdet')
    assert len(neck) == 2
    model = benchmark.build(backbone, neck, scope, True, 64)
    assert [type(part).__name__ for part in (model[0], *model[1])] == ['ResNet', 'FPN', 'DyHead']


@pytest.mark.parametrize(
    ('options', 'found'),
    [
        ('depth=18,out_indices=(2,3)', dict(depth=18, out_indices=(2, 3))),
        ('a=[(1,2),(3,4)],b=x', dict(a=[(1, 2), (3, 4)], b='x')),
        ('out_indices=3', dict(out_indices=(3,))),
    ],
)
def test_options_of_a_model(options, found):
    _, backbone, *_ = benchmark.model_config(f'mmdet.ResNet:{options}', 'sdpa')
    assert backbone == dict(type='mmdet.ResNet') | found


@pytest.mark.parametrize('fpn', [pytest.param('no', marks=pytest.mark.slow), 'yes'])
@pytest.mark.parametrize('spec', ['timm.convnext_atto', 'mmdet.ResNet:depth=18'])
def test_backbones_of_hosts_and_timm(spec, fpn, configs, tmp_path):
    arguments = [spec, configs[0], '--resolutions', 64, '--repeats', 1, '--no-memory', '--fpn', fpn]
    rows = sweep(*arguments, '--out', tmp_path / 'out').run()
    assert [row['model'] for row in rows] == [spec, 'small_vim']
    assert all(row['latency_ms'] > 0 for row in rows)


@pytest.mark.parametrize('spec', ['timm.no_such_model', 'mmdet.NoSuchModel', 'nobody.ResNet'])
def test_unknown_backbones_of_hosts(spec, tmp_path):
    with pytest.raises(ConfigError, match=f"unknown model '{spec}'"):
        sweep(spec, '--out', tmp_path / 'out')
