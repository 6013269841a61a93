"""What `tools/train.py` and `tools/test.py` share: arguments, configs, and errors told in one line."""

import argparse
import difflib
import os
import sys
import traceback
from collections.abc import Callable
from copy import deepcopy
from pathlib import Path

import torch
from mmengine.config import Config, ConfigDict, DictAction
from mmengine.registry import RUNNERS
from mmengine.runner import Runner, find_latest_checkpoint

import mmvim
from mmvim.compat import explain_transformers
from mmvim.compat.types import kind_of
from mmvim.engine.complete import COMPLETED_KEYS, complete_config, completed_keys
from mmvim.engine.config_files import (
    RUNNER_KEYS,
    SPLIT_KEYS,
    ConfigFile,
    check_read,
    config_files,
    follow_validation,
    places_of,
    runner_keys,
    unread,
)
from mmvim.errors import ConfigError, InputError

DEBUG = 'MMVIM_TRACEBACK'


# ---- arguments


def add_cfg_options(parser: argparse.ArgumentParser, text: str) -> None:
    """Give a parser the hosts' --cfg-options, with this help text."""
    parser.add_argument('--cfg-options', nargs='+', action=DictAction, default={}, metavar='KEY=VALUE', help=text)


def _parser(description: str) -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        description=description, epilog=f'Errors in the input are told in one line; set {DEBUG}=1 for the stack trace.'
    )
    parser.add_argument('config', help='config file, also one of mmvim such as vim/cascade_mask_rcnn_vim_ti_coco.py')
    parser.add_argument('--work-dir', help='folder of logs and checkpoints; work_dirs/CONFIG if not given')
    add_cfg_options(
        parser,
        'settings that replace those of the config, such as optim_wrapper.optimizer.lr=1e-4; lists as key="[a,b]" '
        'without blanks',
    )
    parser.add_argument('--launcher', choices=['none', 'pytorch', 'slurm', 'mpi'], default='none', help='job launcher')
    parser.add_argument('--device', choices=['cpu', 'cuda'], help='where to run; a GPU if there is one by default')
    parser.add_argument('--local_rank', '--local-rank', type=int, default=0, help=argparse.SUPPRESS)
    return parser


def train_parser() -> argparse.ArgumentParser:
    """Arguments of tools/train.py."""
    parser = _parser('Train a detector, segmentor or classifier.')
    parser.add_argument('--amp', action='store_true', help='mixed precision in backbone and neck, heads in float32')
    parser.add_argument('--amp-dtype', choices=['bfloat16', 'float16'], default='bfloat16', help='dtype of --amp')
    parser.add_argument('--auto-scale-lr', action='store_true', help='scale the learning rate to the total batch size')
    parser.add_argument(
        '--resume',
        nargs='?',
        const='auto',
        help='go on from the given checkpoint, or from the latest of the work directory if none is given',
    )
    return parser


def test_parser() -> argparse.ArgumentParser:
    """Arguments of tools/test.py."""
    parser = _parser('Test a trained detector, segmentor or classifier.')
    parser.add_argument(
        'checkpoint',
        nargs='?',
        help='checkpoint file, or a work directory: its last checkpoint; with --profile random weights if not given',
    )
    parser.add_argument('--out', help='where predictions go: a .pkl file; for segmentation a folder of label maps')
    parser.add_argument('--show-dir', help='folder of pictures; a relative one is below the work directory')
    parser.add_argument('--show', action='store_true', help='show pictures in a window')
    parser.add_argument('--wait-time', type=float, default=2, help='seconds that a picture is shown')
    parser.add_argument('--tta', action='store_true', help='test-time augmentation')
    parser.add_argument(
        '--profile',
        type=int,
        nargs='?',
        const=1,
        metavar='WARMUP',
        help='split the time per image into data, parts of the model, post-processing and metric, without the first '
        'batch or as many as given',
    )
    return parser


# ---- configs


def find_config(path: str) -> str:
    """Path of a config file: as given, or among those that come with mmvim.

    Raises:
        ConfigError: if there is none, with the closest names.
    """
    if os.path.isfile(path):
        return path
    shipped = [Path(mmvim.__file__).parent / '.mim' / 'configs', Path(mmvim.__file__).parent.parent / 'configs']
    for folder in shipped:
        candidate = folder / path.removeprefix('configs/')
        if candidate.is_file():
            return str(candidate)
    names = {file.name: file for folder in shipped for file in folder.rglob('*.py') if file.is_file()}
    close = difflib.get_close_matches(os.path.basename(path), names, n=3, cutoff=0.5)
    hint = f': did you mean {" or ".join(close)}?' if close else ': check the path'
    raise ConfigError(f"config '{path}' does not exist{hint}")


def load_config(args: argparse.Namespace) -> Config:
    """Read the config and apply the arguments that all tools share.

    Raises:
        ConfigError: if the file cannot be read, or an option names a key that nothing reads.
    """
    path = find_config(args.config)
    try:
        cfg = Config.fromfile(path)
    except SyntaxError as error:
        file = path if (error.filename or '<').startswith('<') else error.filename
        raise ConfigError(f"config '{file}', line {error.lineno}: {error.msg}") from None
    except (KeyError, NameError, TypeError, AttributeError, ImportError) as error:
        raise ConfigError(f"config '{path}' cannot be read: {error}") from None
    _check_names(cfg, path)
    files = config_files(cfg.filename)
    follow_validation(cfg, files)
    check_options(cfg, args.cfg_options)
    before = deepcopy(cfg)
    try:
        cfg.merge_from_dict(args.cfg_options)
    except (TypeError, KeyError, IndexError) as error:
        raise ConfigError(f'--cfg-options {" ".join(args.cfg_options)} does not fit the config: {error}') from None
    _follow_options(cfg, before, args.cfg_options)
    _check_use(cfg, before, args.cfg_options, files)
    cfg.launcher = args.launcher
    cfg.setdefault('runner_type', 'mmvim.Runner')
    if args.work_dir or not cfg.get('work_dir'):
        cfg.work_dir = args.work_dir or os.path.join('work_dirs', Path(args.config).stem)
    if cfg.get('default_scope') == 'mmpretrain':
        for key in ('train_dataloader', 'val_dataloader', 'test_dataloader'):
            if cfg.get(key):
                cfg[key].setdefault('collate_fn', dict(type='default_collate'))
    return cfg


def _check_names(cfg: Config, path: str) -> None:
    for name in cfg:
        close = difflib.get_close_matches(name, RUNNER_KEYS - {'tta_pipeline'}, n=1, cutoff=0.88)
        if name not in RUNNER_KEYS and close and len(name) > 4:
            raise ConfigError(f"config '{path}': nothing reads the key '{name}'; did you mean '{close[0]}'?")


def check_options(cfg: Config, options: dict) -> None:
    """Refuse options whose key nothing would read.

    A key below a ``type`` is left to the type's constructor, which knows its arguments.

    Raises:
        ConfigError: with the closest key.
    """
    for option in options:
        node, seen = cfg, []
        for part in option.split('.'):
            if isinstance(node, (list, tuple)):
                if not part.lstrip('-').isdigit() or int(part) >= len(node):
                    raise ConfigError(
                        f"--cfg-options {option}: '{'.'.join(seen)}' is a list of {len(node)}; name an entry by its "
                        f'number, such as {".".join(seen)}.0'
                    )
                node = node[int(part)]
            elif isinstance(node, dict | Config):
                if part not in node:
                    _refuse_unknown(option, part, seen, node)
                    break
                node = node[part]
            else:
                break
            seen.append(part)


def _refuse_unknown(option: str, part: str, seen: list[str], node: dict) -> None:
    if seen:
        close = difflib.get_close_matches(part, [str(key) for key in node], n=1, cutoff=0.8)
        if 'type' in node or not close:
            return
        hint = f"did you mean '{'.'.join([*seen, close[0]])}'?"
    elif part in RUNNER_KEYS | COMPLETED_KEYS:
        return
    else:
        close = difflib.get_close_matches(part, {*RUNNER_KEYS, *COMPLETED_KEYS, *node}, n=1)
        hint = f"did you mean '{close[0]}'?" if close else f'the config has {sorted(node)}'
    raise ConfigError(f"--cfg-options {option}: the config has no key '{'.'.join([*seen, part])}'; {hint}")


def _follow_options(cfg: Config, before: Config, options: dict) -> None:
    """Let the test follow the validation: options that change one of two equal settings mean both."""
    given = {option.partition('.')[0] for option in options}
    for kind in SPLIT_KEYS:
        val, test = f'val_{kind}', f'test_{kind}'
        if val in given and test not in given and cfg.get(val) is not None and before.get(val) == before.get(test):
            cfg[test] = deepcopy(cfg[val])


def _check_use(cfg: Config, before: Config, options: dict, files: list[ConfigFile]) -> None:
    """Refuse to set a variable of a config file, here or in a file that inherits it: what the file made of it is fixed.

    What :func:`mmvim.engine.complete.complete_config` reads is known only where it finds the data; else it will say
    itself what it lacks.
    """
    read = runner_keys(cfg)
    variables = {option.partition('.')[0] for option in options} - read
    if not variables and not unread(files, read):
        return
    try:
        read |= completed_keys(cfg, complete_config(deepcopy(cfg)))
    except InputError:
        read |= COMPLETED_KEYS
    for name in sorted(variables - read):
        places = places_of(before, name, before.get(name))
        hint = f'set {" and ".join(places[:4])} instead' if places else 'name the key that should change'
        raise ConfigError(f'--cfg-options {name}: nothing in this config takes its value from there; {hint}')
    check_read(cfg, files, read)


# ---- tools


def train(args: argparse.Namespace) -> None:
    """Carry out tools/train.py."""
    cfg = load_config(args)
    if args.amp:
        _use_amp(cfg, args.amp_dtype)
    if args.auto_scale_lr:
        if not (cfg.get('auto_scale_lr') or {}).get('base_batch_size'):
            raise ConfigError(
                '--auto-scale-lr: the config does not say for which batch size its learning rate is meant; add '
                'auto_scale_lr=dict(base_batch_size=...)'
            )
        cfg.auto_scale_lr.enable = True
    if args.resume:
        cfg.resume = True
        cfg.load_from = None if args.resume == 'auto' else args.resume
    elif not cfg.get('resume'):
        _protect(cfg.work_dir)
    RUNNERS.build(cfg).train()


def _use_amp(cfg: Config, dtype: str) -> None:
    wrapper = cfg.optim_wrapper
    if kind_of(wrapper) not in ('', 'OptimWrapper', 'AmpOptimWrapper'):
        raise ConfigError(f'--amp cannot be combined with optim_wrapper.type={wrapper.type!r}: set its own precision')
    wrapper.update(type='mmvim.AmpOptimWrapper', dtype=dtype)
    if dtype == 'bfloat16':
        wrapper.pop('loss_scale', None)


def _protect(work_dir: str) -> None:
    saved = sorted(Path(work_dir).glob('*.pth'), key=lambda file: file.stat().st_mtime)
    if saved:
        raise ConfigError(
            f"work directory '{work_dir}' already holds checkpoints ({saved[-1].name}): go on with --resume, or choose "
            'another --work-dir'
        )


def test(args: argparse.Namespace) -> None:
    """Carry out tools/test.py."""
    cfg = load_config(args)
    cfg.load_from, cfg.resume = args.checkpoint and find_checkpoint(args.checkpoint), False
    if args.profile is not None:
        cfg.custom_hooks = [*(cfg.get('custom_hooks') or []), dict(type='mmvim.TimeSplitHook', warmup=args.profile)]
    elif not args.checkpoint:
        raise ConfigError('no checkpoint given: name a .pth file or a work directory; only --profile goes without')
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
    if args.out and scope != 'mmseg':
        runner.test_evaluator.metrics.append(_dump_metric(scope)(out_file_path=args.out))
    runner.test()
    if args.out:
        print(f'predictions are in {args.out}')
    if args.show_dir:
        print(f'pictures are in {_picture_folder(args.show_dir, runner, scope)}')


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


def find_checkpoint(path: str) -> str:
    """A checkpoint file as given, or the last one in a work directory.

    Raises:
        ConfigError: if there is none.
    """
    if os.path.isdir(path):
        last = find_latest_checkpoint(path)
        if last is None:
            raise ConfigError(f"work directory '{path}' holds no checkpoint: train first, or give a .pth file")
        return last
    if '://' not in path and not os.path.isfile(path):
        raise ConfigError(f"checkpoint '{path}' does not exist: give the path of a .pth file or of a work directory")
    return path


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


def _dump_metric(scope: str | None) -> type:
    if scope == 'mmdet':
        from mmdet.evaluation import DumpDetResults

        return DumpDetResults
    from mmengine.evaluator import DumpResults

    return DumpResults


def _use_tta(cfg: Config, scope: str | None) -> None:
    """Wrap model and pipeline for test-time augmentation; where the config does not say how, by horizontal flips."""
    dataset = cfg.test_dataloader.dataset
    while 'dataset' in dataset:
        dataset = dataset.dataset
    if 'tta_model' not in cfg:
        if scope == 'mmdet':
            nms = dict(type='nms', iou_threshold=0.5)
            cfg.tta_model = dict(type='mmvim.InstanceTTAModel', tta_cfg=dict(nms=nms, max_per_img=100))
        else:
            cfg.tta_model = dict(type='AverageClsScoreTTA' if scope == 'mmpretrain' else 'SegTTAModel')
    if 'tta_pipeline' not in cfg:
        cfg.tta_pipeline = _flip_pipeline(dataset.pipeline)
    cfg.model = ConfigDict(**cfg.tta_model, module=cfg.model)
    dataset.pipeline = cfg.tta_pipeline


def _flip_pipeline(pipeline: list[dict]) -> list[dict]:
    """A test pipeline that gives each image as it is and flipped; ground truth and padding come after the flip."""
    pipeline = deepcopy(list(pipeline))
    kinds = [kind_of(step) for step in pipeline]
    at = next(i for i, kind in enumerate(kinds) if kind.startswith(('Pack', 'LoadAnnotations', 'Pad')))
    if 'meta_keys' in pipeline[-1]:
        pipeline[-1]['meta_keys'] = tuple(dict.fromkeys((*pipeline[-1]['meta_keys'], 'flip', 'flip_direction')))
    flips = [dict(type='RandomFlip', prob=0.0), dict(type='RandomFlip', prob=1.0)]
    return [*pipeline[:at], dict(type='TestTimeAug', transforms=[flips, *([step] for step in pipeline[at:])])]


# ---- errors


def run(tool: Callable[[argparse.Namespace], None], args: argparse.Namespace) -> None:
    """Run a tool; end with status 1 and one line if the input is at fault, 130 if it was interrupted."""
    os.environ.setdefault('LOCAL_RANK', str(getattr(args, 'local_rank', 0)))
    try:
        if args.device == 'cuda' and not torch.cuda.is_available():
            raise ConfigError('--device cuda: torch sees no GPU here; use --device cpu, or install torch for CUDA')
        tool(args)
    except KeyboardInterrupt:
        print('\ninterrupted; go on from the last checkpoint with --resume', file=sys.stderr)
        sys.exit(130)
    except Exception as error:
        message = explain(error)
        if message is None or os.environ.get(DEBUG):
            raise
        rank = f' (process {os.environ["RANK"]})' if int(os.environ.get('WORLD_SIZE', '1')) > 1 else ''
        print(f'error{rank}: {message}', file=sys.stderr)
        sys.exit(1)


def explain(error: Exception) -> str | None:
    """One line for an error that the user's input caused; None for all others, which keep their stack trace."""
    text = str(error)
    if isinstance(error, InputError):
        # A data loader's worker puts the whole stack trace into the message.
        return text.rstrip().rsplit(f'{type(error).__name__}: ', 1)[-1] if 'Traceback' in text else text
    if isinstance(error, FileExistsError | FileNotFoundError | PermissionError | IsADirectoryError):
        return f"{error.strerror}: '{error.filename}'; check the paths in the config" if error.filename else text
    if type(error).__name__ == 'OutOfMemoryError':
        return 'out of GPU memory: lower train_dataloader.batch_size, set model.backbone.with_cp=True, or use --amp'
    if 'image size in a batch should be the same' in text or 'stack expects each tensor to be equal size' in text:
        return (
            'the images of a batch differ in size, which MMSegmentation takes in training alone and MMPretrain never: '
            'resize or crop them to one size in the pipeline, or set batch_size=1 in the data loader'
        )
    of_transformers = explain_transformers(error)
    if of_transformers:
        return of_transformers
    frames = [frame for frame in traceback.extract_tb(error.__traceback__) if 'build_functions' in frame.filename]
    if not frames:
        return None
    if text.startswith('Failed to get ') or 'is not in the' in text:
        name = text.removeprefix('Failed to get ').split(' is not in')[0].strip('\'"')
        return f"the config names type '{name}', which no registry has: check its spelling and its scope{_close(name)}"
    if isinstance(error, TypeError) and ('() ' in text or text.startswith('cfg should be')):  # a call's signature
        return f'wrong config key: {text}'
    if isinstance(error, ValueError):
        return f'wrong value in the config: {text}'
    return None


def _close(name: str) -> str:
    from mmengine.registry import root

    scope, _, plain = name.rpartition('.')
    known = []
    for registry in vars(root).values():
        for child in [registry, *getattr(registry, '_children', {}).values()]:
            if getattr(child, 'scope', None) in (scope or 'mmdet', 'mmdet', 'mmvim'):
                known += [f'{child.scope}.{key}' for key in getattr(child, '_module_dict', {})]
    close = difflib.get_close_matches(plain, [key.split('.')[-1] for key in known], n=1)
    full = next((key for key in known if close and key.split('.')[-1] == close[0]), None)
    return f'; did you mean {full}?' if full else ''
