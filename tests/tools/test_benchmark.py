"""tools/benchmark.py: real sweeps of small models."""

import csv
import json

import pytest

from mmvim.analysis import benchmark
from mmvim.errors import ConfigError, InputError

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


def test_rows_files_and_plots(configs, tmp_path, capsys):
    out = tmp_path / 'out'
    arguments = [*configs, '--resolutions', 32, 48, '--batch-sizes', 2, '--fpn', 'both', '--repeats', 2, '--out', out]
    benchmark.main(benchmark.parser().parse_args([str(a) for a in (*arguments, '--no-memory')]))
    rows = json.loads((out / 'benchmark.json').read_text())
    assert {(r['model'], r['resolution'], r['fpn']) for r in rows} == {
        (model, size, fpn) for model in ('small_vim', 'small_deit') for size in (32, 48) for fpn in (False, True)
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
    assert 'times the speed of small_vim' in capsys.readouterr().out


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


def test_training_in_bfloat16(configs, tmp_path):
    arguments = ['--resolutions', 32, '--repeats', 1, '--no-memory', '--train', '--dtype', 'bfloat16']
    (row,) = sweep(configs[0], *arguments, '--out', tmp_path / 'out').run()
    assert row['mode'] == 'training' and row['dtype'] == 'bfloat16' and row['latency_ms'] > 0


def test_memory_of_a_process_of_its_own(configs, tmp_path):
    arguments = ['--resolutions', 768, '--repeats', 1, '--attention', 'materialized']
    (row,) = sweep(configs[1], *arguments, '--out', tmp_path / 'out').run()
    matrix = 2 * (768 // 16) ** 4 * 4 / 2**20  # of two heads in float32, 40.5 MiB
    assert matrix < row['memory_mib'] < 2000


def test_memory_that_does_not_suffice_is_recorded(configs, tmp_path, monkeypatch):
    def refuse(*args):
        raise RuntimeError("[enforce fail] DefaultCPUAllocator: can't allocate memory: you tried to allocate 1 bytes")

    monkeypatch.setattr(benchmark, 'runner', lambda *args: refuse)
    (row,) = sweep(configs[0], '--resolutions', 32, '--no-memory', '--out', tmp_path / 'out').run()
    assert row['error'] == 'out of memory' and 'latency_ms' not in row


def test_both_kinds_of_attention_by_name(tmp_path):
    found = sweep('vim-tiny', 'deit-tiny', '--attention', 'both', '--baseline', 'deit-tiny', '--out', tmp_path / 'out')
    assert list(found.models) == ['vim-tiny', 'deit-tiny (sdpa)', 'deit-tiny (materialized)']
    assert found.baseline == 'deit-tiny (sdpa)'


@pytest.mark.parametrize(
    ('arguments', 'message'),
    [
        (['vim-huge'], "unknown model 'vim-huge': give the path of a config .* vim-tiny"),
        (['vim-tiny', '--device', 'cuda:7'], '--device cuda:7: '),
        (['vim-tiny', '--device', 'gpu'], '--device gpu: '),
        (['vim-tiny', '--resolutions', '0'], '--resolutions: 0 is not positive'),
        (['vim-tiny', '--batch-sizes', '-1'], '--batch-sizes: -1 is not positive'),
        (['vim-tiny', '--baseline', 'deit-tiny'], '--baseline deit-tiny: not one of the measured models vim-tiny'),
        (['vim-tiny:depth=3'], 'mmvim.VisionMamba at 224 px: .*depth'),
    ],
)
def test_bad_input_ends_before_anything_is_measured(arguments, message, tmp_path):
    with pytest.raises(InputError, match=message):
        sweep(*arguments, '--out', tmp_path / 'out')
    assert not (tmp_path / 'out').exists()


@pytest.mark.parametrize('fpn', ['no', 'yes'])
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
