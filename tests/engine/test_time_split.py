"""TimeSplitHook: the time of real tests of a small detector, segmentor and classifier."""

import json
from pathlib import Path

import pytest
from mmengine.config import Config
from mmengine.hooks import Hook
from mmengine.registry import RUNNERS

from mmvim.engine import time_split
from mmvim.engine.hooks import unwrapped
from mmvim.engine.time_split import FILE, TimeSplitHook
from mmvim.errors import ConfigError
from mmvim.tools import command_line, test

CONFIGS = Path(__file__).parent.parent.parent / 'configs'
LOADER = 'dict(batch_size=1, num_workers=0, persistent_workers=False, dataset=dict(shapes=shapes))'
DETECTOR = f"""
_base_ = '{CONFIGS}/demo/cascade_mask_rcnn_vim_ti_shapes.py'
shapes = dict(num_train=2, num_val=3, image_size=(64, 64), size_range=(16, 40))
model = dict(
    backbone=dict(arch=dict(embed_dims=16, depth=1, d_state=2), img_size=64),
    neck=dict(in_channels=16),
    test_cfg=dict(rpn=dict(max_per_img=10), rcnn=dict(max_per_img=2)),
)
test_dataloader = {LOADER}
"""
SEGMENTOR = f"""
_base_ = '{CONFIGS}/demo/upernet_mambavision_shapes.py'
shapes = dict(num_train=2, num_val=3, image_size=(64, 64), size_range=(16, 40))
test_dataloader = {LOADER}
"""


@pytest.fixture
def run(tmp_path, monkeypatch):
    """Test a config, with more hooks if given; returns the runner after the test and what was measured."""
    monkeypatch.chdir(tmp_path)

    def call(text, *hooks, profile=True, prepare=None):
        (tmp_path / 'tiny.py').write_text(text)
        cfg = Config.fromfile('tiny.py')
        cfg.merge_from_dict(dict(work_dir='work', launcher='none', runner_type='mmvim.Runner'))
        cfg.custom_hooks = [dict(type='mmvim.TimeSplitHook')] * profile
        runner = RUNNERS.build(cfg)
        for hook in hooks:
            runner.register_hook(hook, priority='LOWEST')
        if prepare:
            prepare(runner)
        runner.test()
        path = Path(runner.log_dir) / FILE
        return runner, json.loads(path.read_text()) if path.exists() else None

    return call


class Probe(Hook):
    """Notes, in the middle of a test, which methods of the model are replaced."""

    replaced: set[str]

    def before_test_iter(self, runner, batch_idx, data_batch=None):
        named = [*unwrapped(runner.model).named_modules(), ('evaluator', runner.test_loop.evaluator)]
        self.replaced = {
            f'{name}.{key}' for name, owner in named for key, value in vars(owner).items() if callable(value)
        }


def test_every_moment_has_one_row(run, monkeypatch):
    """A clock that only parts of a detector move, one inside of the other: each shows up in its own row alone."""
    clock = [0.0]
    monkeypatch.setattr(time_split, 'clock', lambda device: clock[0])

    def slowed(method, seconds):
        def call(*args, **kwargs):
            clock[0] += seconds
            return method(*args, **kwargs)

        return call

    pauses = {}

    def prepare(runner):
        model, roi_head = runner.model, runner.model.roi_head
        for seconds, row, owner, method in (
            (1, 'data', runner.test_dataloader.dataset, 'prepare_data'),
            (2, 'preprocessing', model.data_preprocessor, 'forward'),
            (4, 'backbone', model.backbone.layers[0], 'forward'),
            (8, 'rpn_head', model.rpn_head, 'forward'),
            (16, 'post-processing', model.rpn_head, 'predict_by_feat'),
            (32, 'roi_head', roi_head, 'predict_bbox'),
            (64, 'roi_head', roi_head.bbox_head[2], 'forward'),
            (128, 'post-processing', roi_head.bbox_head[2], 'predict_by_feat'),
            (256, 'roi_head', roi_head.mask_head[0], 'forward'),
            (512, 'post-processing', roi_head.mask_head[0], 'predict_by_feat'),
            (1024, 'metric', runner.test_evaluator.metrics[0], 'process'),
            (2048, 'rest', model, 'predict'),
        ):
            setattr(owner, method, slowed(getattr(owner, method), seconds))
            pauses[row] = pauses.get(row, 0) + 1e3 * seconds

    _, found = run(DETECTOR, prepare=prepare)
    assert {name: row['each_ms'] for name, row in found['rows'].items()} == {
        row: [pause, pause] for row, pause in pauses.items()
    }
    assert found['total']['each_ms'] == [4095e3, 4095e3]
    assert found['images'] == 2 and found['checkpoint'] is None and found['image_shapes'] == {'128x128': 2}


def test_a_segmentor(run):
    runner, found = run(SEGMENTOR)
    rows = found['rows']
    assert list(rows) == ['data', 'preprocessing', 'backbone', 'decode_head', 'post-processing', 'metric', 'rest']
    times = list(runner.message_hub.get_scalar('test/time').data[0])
    assert sum(row['mean_ms'] for row in rows.values()) == pytest.approx(found['total']['mean_ms'])
    assert found['total']['mean_ms'] == pytest.approx(1e3 * sum(times[1:]) / 2, rel=0.3)
    assert 'instances found' not in (Path(runner.log_dir) / f'{runner.timestamp}.log').read_text()


def test_all_is_put_back(run):
    probe = Probe()
    runner, _ = run(DETECTOR, probe)
    assert {'backbone.forward', 'roi_head.predict', 'roi_head.bbox_head.2.predict_by_feat', 'evaluator.process'} <= (
        probe.replaced
    )
    inside = probe.replaced
    probe.before_test_iter(runner, 0)
    assert not probe.replaced & {
        name for name in inside if name.endswith(('.forward', '.predict', '.process', 'by_feat'))
    }


def test_switched_off_nothing_is_touched(run):
    probe = Probe()
    runner, found = run(SEGMENTOR, probe, profile=False)
    assert found is None
    assert not {name for name in probe.replaced if name.endswith(('.forward', '.predict', '.process', 'by_feat'))}


def test_the_option_of_the_tool(tmp_path, monkeypatch, capfd):
    (tmp_path / 'tiny.py').write_text(SEGMENTOR)
    monkeypatch.chdir(tmp_path)
    arguments = ['tiny.py', '--profile', '1', '--work-dir', 'work']
    command_line.run(test, arguments)
    output = capfd.readouterr().out
    assert 'ms per image' in output and '2 images of 64x64, 1 in a batch, after 1 batches of warm-up' in output
    (path,) = (tmp_path / 'work').glob(f'*/{FILE}')
    assert json.loads(path.read_text())['images'] == 2


def test_too_few_images(run):
    with pytest.raises(ConfigError, match='time of 3 batches cannot be split with 3 of them left out.*--profile 0'):
        run(SEGMENTOR, TimeSplitHook(warmup=3), profile=False)


def test_only_a_profile_goes_without_checkpoint():
    with pytest.raises(ConfigError, match='no checkpoint given'):
        test.main(test.parser().parse_args(['demo/upernet_mambavision_shapes.py']))
