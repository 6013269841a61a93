"""What `tools/test.py` does."""

import argparse
import os
import sys
from collections.abc import Callable, Sequence
from copy import deepcopy
from functools import partial

from mmengine.config import Config, ConfigDict
from mmengine.dist import get_world_size
from mmengine.evaluator import BaseMetric
from mmengine.registry import METRICS, RUNNERS
from mmengine.runner import Runner

from mmvim.compat.output_names import names_of
from mmvim.compat.types import kind_of
from mmvim.config.data import dataset_of
from mmvim.errors import ConfigError
from mmvim.tools.command_line import find_checkpoint, load_config, run_parser


def parser() -> argparse.ArgumentParser:
    """Arguments of tools/test.py."""
    result = run_parser('Test a trained detector, segmentor or classifier.')
    result.add_argument(
        'checkpoint',
        nargs='?',
        help='checkpoint file, or a work directory: its last checkpoint; with --profile random weights if not given',
    )
    result.add_argument('--out', help='where predictions go: a .pkl file; for segmentation a folder of label maps')
    result.add_argument('--show-dir', help='folder of pictures; a relative one is below the work directory')
    result.add_argument('--show', action='store_true', help='show pictures in a window')
    result.add_argument('--wait-time', type=float, default=2, help='seconds that a picture is shown')
    result.add_argument('--tta', action='store_true', help='test-time augmentation')
    result.add_argument(
        '--profile',
        type=int,
        nargs='?',
        const=1,
        metavar='WARMUP',
        help='split the time per image into data, parts of the model, post-processing and metric, without the first '
        'batch or as many as given',
    )
    return result


def main(args: argparse.Namespace) -> None:
    """Carry out tools/test.py."""
    cfg = load_config(args)
    cfg.load_from, cfg.resume = args.checkpoint and find_checkpoint(args.checkpoint), False
    if args.profile is not None:
        cfg.custom_hooks = [*(cfg.get('custom_hooks') or []), dict(type='mmvim.TimeSplitHook', warmup=args.profile)]
    elif not args.checkpoint:
        raise ConfigError('no checkpoint given: name a .pth file or a work directory; only --profile works without one')
    scope = cfg.get('default_scope')
    if args.out and scope == 'mmseg':
        write_label_maps(cfg, args.out)
    elif args.out and not args.out.endswith(('.pkl', '.pickle')):
        raise ConfigError(f"--out '{args.out}': predictions go to a file that ends in .pkl")
    if args.show or args.show_dir:
        _draw(cfg, args, scope)
    if args.tta:
        _use_tta(cfg, scope)
    runner = RUNNERS.build(cfg)
    if (args.show or args.show_dir) and get_world_size() > 1:
        raise ConfigError('--show-dir: only the first process would draw its images; run this test in one process')
    keep_apart(runner)
    for written in (args.out, args.show_dir and _picture_folder(args.show_dir, runner, scope)):
        _warn_of_files(written)
    if args.out and scope != 'mmseg':
        kind = 'mmdet.DumpDetResults' if scope == 'mmdet' else 'mmengine.DumpResults'
        runner.test_evaluator.metrics.append(METRICS.build(dict(type=kind, out_file_path=args.out)))
    runner.test()
    if args.out:
        print(f'predictions are in {args.out}')
    if args.show_dir:
        print(f'pictures are in {_picture_folder(args.show_dir, runner, scope)}')


def keep_apart(runner: Runner) -> None:
    """Give every image of the test its own picture and label map, whatever its folder and name."""
    dataset = runner.test_dataloader.dataset
    indices = range(len(dataset)) if hasattr(dataset, 'get_data_info') else ()
    paths = [path for path in (dataset.get_data_info(index).get('img_path') for index in indices) if path]
    drawing = [getattr(hook, '_visualizer', None) for hook in runner.hooks]  # of another runner, if that came last
    for visualizer in {id(one): one for one in (runner.visualizer, *drawing) if one is not None}.values():
        names_of(visualizer).announce(paths)
    for metric in runner.test_evaluator.metrics:
        if getattr(metric, 'output_dir', None):
            names_of(metric).announce(paths, by_stem=True)
            metric.process = partial(_process_apart, metric, metric.process)


def _process_apart(metric: BaseMetric, process: Callable, batch: dict, samples: Sequence[dict]) -> None:
    """Let a metric that writes a file for each image, which it names after the image, write one for each."""
    renamed = []
    for sample in samples:
        stem = os.path.splitext(os.path.basename(sample['img_path']))[0]
        name = names_of(metric).of(os.path.join(metric.output_dir, f'{stem}.png'), sample['img_path'])
        renamed.append(dict(sample, img_path=os.path.basename(name)))
    process(batch, renamed)


def _warn_of_files(written: str | None) -> None:
    """Say what happens to the files of an earlier run."""
    if written and os.path.isfile(written):
        print(f"'{written}' exists and will be replaced", file=sys.stderr)
    elif written and os.path.isdir(written) and os.listdir(written):
        print(f"folder '{written}' is not empty: files of the same name will be replaced, others stay", file=sys.stderr)


def write_label_maps(cfg: Config, folder: str) -> None:
    """Let a metric of the evaluator, which may be one, a list, or a dict that holds them, write predictions."""
    evaluator = cfg.test_evaluator
    metrics = evaluator.get('metrics', evaluator) if isinstance(evaluator, dict) else evaluator
    metrics = [metrics] if isinstance(metrics, dict) else metrics
    kinds = ('IoUMetric', 'CityscapesMetric')
    writer = next((metric for metric in metrics if kind_of(metric) in kinds), None)
    if writer is None:
        raise ConfigError(f'--out: test_evaluator has no metric that writes label maps: add one of {kinds}')
    writer.update(output_dir=folder, keep_results=True)


def _draw(cfg: Config, args: argparse.Namespace, scope: str | None) -> None:
    if 'visualization' not in (cfg.get('default_hooks') or {}):
        raise ConfigError(
            "--show-dir: the config has no default_hooks.visualization; add the host's visualization hook"
        )
    hook = cfg.default_hooks.visualization
    hook.update(show=args.show, wait_time=args.wait_time)
    if scope == 'mmpretrain':
        hook.update(enable=True, interval=1)
        if args.show_dir:
            hook.out_dir = os.path.join(cfg.work_dir, args.show_dir)
        return
    hook.draw = True
    if args.show_dir and scope == 'mmseg':
        hook.interval = 1
        cfg.visualizer.save_dir = os.path.join(cfg.work_dir, args.show_dir)
    elif args.show_dir:
        hook.test_out_dir = args.show_dir


def _picture_folder(show_dir: str, runner: Runner, scope: str | None) -> str:
    if scope == 'mmpretrain':
        return os.path.join(runner.work_dir, show_dir)
    if scope == 'mmseg':
        return os.path.join(runner.work_dir, show_dir, 'vis_data', 'vis_image')
    return os.path.join(runner.work_dir, runner.timestamp, show_dir)


def _use_tta(cfg: Config, scope: str | None) -> None:
    """Wrap model and pipeline for test-time augmentation; where the config does not say how, by horizontal flips."""
    dataset = dataset_of(cfg.test_dataloader)
    if 'tta_model' not in cfg:
        if scope == 'mmdet':
            nms = dict(type='nms', iou_threshold=0.5)
            cfg.tta_model = dict(type='mmvim.InstanceTTAModel', tta_cfg=dict(nms=nms, max_per_img=100))
        else:
            cfg.tta_model = dict(type='AverageClsScoreTTA' if scope == 'mmpretrain' else 'SegTTAModel')
    if 'tta_pipeline' not in cfg:
        cfg.tta_pipeline = _flip_pipeline(dataset['pipeline'])
    cfg.model = ConfigDict(**cfg.tta_model, module=cfg.model)
    dataset['pipeline'] = cfg.tta_pipeline


def _flip_pipeline(pipeline: list[dict]) -> list[dict]:
    """A test pipeline that gives each image as it is and flipped; ground truth and padding come after the flip."""
    pipeline = deepcopy(list(pipeline))
    kinds = [kind_of(step) for step in pipeline]
    at = next(i for i, kind in enumerate(kinds) if kind.startswith(('Pack', 'LoadAnnotations', 'Pad')))
    if 'meta_keys' in pipeline[-1]:
        pipeline[-1]['meta_keys'] = tuple(dict.fromkeys((*pipeline[-1]['meta_keys'], 'flip', 'flip_direction')))
    flips = [dict(type='RandomFlip', prob=0.0), dict(type='RandomFlip', prob=1.0)]
    return [*pipeline[:at], dict(type='TestTimeAug', transforms=[flips, *([step] for step in pipeline[at:])])]
