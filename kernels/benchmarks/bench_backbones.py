"""Times whole backbones, Vim-Ti against timm's DeiT-Ti: all sides in one process, in turn, medians.

    python kernels/benchmarks/bench_backbones.py --sizes 224 512 1024 1248 --json rows.json
    python kernels/benchmarks/bench_backbones.py --sizes 1024 --train
    python kernels/benchmarks/bench_backbones.py --sizes 1248 --memory

Batch 1, float32. DeiT runs with F.scaled_dot_product_attention ("sdpa") and with the L x L matrix in memory
("materialised"). ``--memory`` measures the peak resident set of a forward pass less that after one at 224 px, each
model in a process of its own.
"""

from __future__ import annotations

import argparse
import json
import os
import resource
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import torch
from torch import nn

sys.path.insert(0, str(Path(__file__).resolve().parent))

from bench_selective_scan import machine, median_times  # noqa: E402

SIDES = ('vim', 'deit sdpa', 'deit materialised')


def build(side: str, size: int) -> nn.Module:
    torch.manual_seed(0)
    if side == 'vim':
        from mmvim.models import VisionMamba

        return VisionMamba('tiny', img_size=size, cls_token=None, out_type='featmap')
    import timm

    timm.layers.set_fused_attn(side == 'deit sdpa')
    return timm.create_model('deit_tiny_patch16_224', img_size=size, num_classes=0, global_pool='')


def inference(model: nn.Module, x: torch.Tensor) -> Callable:
    model.eval()

    def call():
        with torch.inference_mode():
            model(x)

    return call


def training_step(model: nn.Module, x: torch.Tensor) -> Callable:
    """Forward and backward; the loss is the sum of the squared outputs."""
    model.train()

    def call():
        model.zero_grad()
        y = model(x)
        (y[0] if isinstance(y, tuple) else y).square().sum().backward()

    return call


def peak_rss_mib() -> float:
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024


def memory_alone(side: str, size: int) -> float:
    """MiB by which a pass at this size raises the peak resident set of this process over that of one at 224 px."""
    inference(build(side, 224), torch.randn(1, 3, 224, 224))()
    before = peak_rss_mib()
    inference(build(side, size), torch.randn(1, 3, size, size))()
    return peak_rss_mib() - before


def memory(side: str, size: int) -> float:
    command = [sys.executable, __file__, '--alone', side, '--sizes', str(size)]
    done = subprocess.run(command, capture_output=True, text=True, env=os.environ, check=True)
    return float(done.stdout.split()[-1])


def measure(args: argparse.Namespace, size: int) -> dict[str, float]:
    """MiB or milliseconds of every side."""
    if args.memory:
        return {side: memory(side, size) for side in args.sides}
    make = training_step if args.train else inference
    x = torch.randn(1, 3, size, size)
    calls = {side: make(build(side, size), x) for side in args.sides}
    return {side: 1e3 * s for side, s in median_times(calls, args.repeats).items()}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument(
        '--sizes', type=int, nargs='+', default=[224, 512, 1024, 1248], help='side of the image, pixels'
    )
    parser.add_argument('--repeats', type=int, default=5)
    parser.add_argument('--train', action='store_true', help='time forward and backward')
    parser.add_argument('--memory', action='store_true', help='measure memory, not time')
    parser.add_argument('--sides', nargs='+', choices=SIDES, default=SIDES)
    parser.add_argument('--json', type=Path)
    parser.add_argument('--alone', choices=SIDES, help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.alone:
        print(memory_alone(args.alone, args.sizes[0]))
        return
    import timm

    about = machine() | {'timm': timm.__version__}
    print(', '.join(f'{key} {value}' for key, value in about.items()))
    what = 'memory' if args.memory else 'training step' if args.train else 'inference'
    unit = 'MiB' if args.memory else 'ms'
    rows = []
    for size in args.sizes:
        values = measure(args, size)
        rows.append(about | {'what': what, 'size': size, 'unit': unit} | values)
        text = [f'{side} {value:.1f} {unit}' for side, value in values.items()]
        text += [f'{s} / vim {values[s] / values["vim"]:.2f}' for s in values if s != 'vim' and 'vim' in values]
        print(f'{what} {size} px: ' + ', '.join(text), flush=True)
    if args.json:
        args.json.write_text(json.dumps(rows, indent=1) + '\n')


if __name__ == '__main__':
    main()
