"""What `tools/train.py` does."""

import argparse

from mmengine.config import Config
from mmengine.registry import RUNNERS

from mmvim.compat.types import kind_of
from mmvim.engine.resume_choice import checkpoints_in
from mmvim.errors import ConfigError
from mmvim.tools.command_line import load_config, run_parser


def parser() -> argparse.ArgumentParser:
    """Arguments of tools/train.py."""
    result = run_parser('Train a detector, segmentor or classifier.')
    result.add_argument('--amp', action='store_true', help='mixed precision in backbone and neck, heads in float32')
    result.add_argument('--amp-dtype', choices=['bfloat16', 'float16'], default='bfloat16', help='dtype of --amp')
    result.add_argument('--auto-scale-lr', action='store_true', help='scale the learning rate to the total batch size')
    result.add_argument(
        '--resume',
        nargs='?',
        const='auto',
        help='resume from this checkpoint, or from the latest one in the work directory if none is given',
    )
    return result


def main(args: argparse.Namespace) -> None:
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
        cfg.resume = 'auto' if args.resume == 'auto' else True
        cfg.load_from = cfg.get('load_from') if args.resume == 'auto' else args.resume
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
    saved = sorted(checkpoints_in(work_dir), key=lambda file: file.lstat().st_mtime)
    if saved:
        raise ConfigError(
            f"work directory '{work_dir}' already holds checkpoints ({saved[-1].name}): continue with --resume, or "
            'choose another --work-dir'
        )
