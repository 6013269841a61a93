"""What the tools share: arguments, the config of a run, and the end of a tool whose input is wrong."""

import argparse
import os
import sys
from collections.abc import Sequence
from pathlib import Path
from types import ModuleType

import torch
from mmengine.config import Config, DictAction

from mmvim.config.reading import read_config
from mmvim.engine.resume_choice import check_weights, newest_checkpoint
from mmvim.errors import ConfigError
from mmvim.tools.errors import explain

DEBUG = 'MMVIM_TRACEBACK'


def new_parser(description: str, epilog: str = 'Errors in the input take one line') -> argparse.ArgumentParser:
    """A parser whose help ends with how to see the stack trace of an error."""
    return argparse.ArgumentParser(description=description, epilog=f'{epilog}; set {DEBUG}=1 for the stack trace.')


def add_cfg_options(parser: argparse.ArgumentParser, text: str) -> None:
    """Give a parser the hosts' --cfg-options, with this help text."""
    parser.add_argument('--cfg-options', nargs='+', action=DictAction, default={}, metavar='KEY=VALUE', help=text)


def run_parser(description: str) -> argparse.ArgumentParser:
    """A parser with the arguments that training and test share."""
    parser = new_parser(description)
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


def load_config(args: argparse.Namespace) -> Config:
    """Read the config of a run and apply the arguments that training and test share.

    Raises:
        ConfigError: if the file cannot be read, or an option names a key that nothing reads.
    """
    cfg = read_config(args.config, args.cfg_options)
    cfg.launcher = args.launcher
    cfg.setdefault('runner_type', 'mmvim.Runner')
    if args.work_dir or not cfg.get('work_dir'):
        cfg.work_dir = args.work_dir or os.path.join('work_dirs', Path(args.config).stem)
    if cfg.get('default_scope') == 'mmpretrain':
        for key in ('train_dataloader', 'val_dataloader', 'test_dataloader'):
            if cfg.get(key):
                cfg[key].setdefault('collate_fn', dict(type='default_collate'))
    return cfg


def find_checkpoint(path: str) -> str:
    """A checkpoint file as given, or the newest one in a work directory that can be read.

    Raises:
        ConfigError: if there is none.
        CheckpointError: if there are, but none can be read.
    """
    if os.path.isdir(path):
        last, skipped = newest_checkpoint([path], check_weights, path)
        if last is None:
            raise ConfigError(f"work directory '{path}' holds no checkpoint: train first, or give a .pth file")
        for line in skipped:
            print(f'skipped {line}', file=sys.stderr)
        return str(last.path)
    if '://' not in path and not os.path.isfile(path):
        raise ConfigError(f"checkpoint '{path}' does not exist: give the path of a .pth file or of a work directory")
    return path


def run(tool: ModuleType, arguments: Sequence[object] | None = None) -> None:
    """Run a tool; end with status 1 and one line if the input is at fault, 130 if it was interrupted.

    Args:
        tool: module of the tool, with ``parser()`` and ``main(args)``.
        arguments: its arguments; those of the command line if not given.
    """
    args = tool.parser().parse_args(None if arguments is None else [str(argument) for argument in arguments])
    os.environ.setdefault('LOCAL_RANK', str(getattr(args, 'local_rank', 0)))
    try:
        if getattr(args, 'device', None) == 'cuda' and not torch.cuda.is_available():
            raise ConfigError('--device cuda: torch sees no GPU here; use --device cpu, or install torch for CUDA')
        tool.main(args)
    except KeyboardInterrupt:
        print('\ninterrupted; continue from the last checkpoint with --resume', file=sys.stderr)
        sys.exit(130)
    except Exception as error:
        message = explain(error)
        if message is None or os.environ.get(DEBUG):
            raise
        rank = f' (process {os.environ["RANK"]})' if int(os.environ.get('WORLD_SIZE', '1')) > 1 else ''
        print(f'error{rank}: {message}', file=sys.stderr)
        sys.exit(1)
