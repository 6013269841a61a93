"""Times the selective scan against the eager loop over time: both sides in one process, in turn, medians.

    python kernels/benchmarks/bench_selective_scan.py --yardstick LOOP.py

Refuses to print a time unless outputs and gradients agree with the float64 reference. ``--json`` writes the rows to a
file, with device, versions, commit and threads.
"""

from __future__ import annotations

import argparse
import importlib.metadata
import importlib.util
import json
import platform
import statistics
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path

import torch

sys.path[:0] = [str(Path(__file__).resolve().parents[1]), str(Path(__file__).resolve().parent)]

import cases  # noqa: E402

from ssm_kernels import bidirectional_selective_scan, selective_scan, selective_scan_fn  # noqa: E402

NUMERICS = cases.Case('benchmark', L=300, D=72, N=16, batch=1)


def machine() -> dict[str, str | int]:
    name, features = platform.processor() or platform.machine(), ''
    if Path('/proc/cpuinfo').exists():
        info = dict(line.split(':', 1) for line in Path('/proc/cpuinfo').read_text().splitlines() if ':' in line)
        info = {key.strip(): value.strip() for key, value in info.items()}
        name, flags = info.get('model name', name), info.get('flags', '').split()
        features = ' AVX-512' if 'avx512f' in flags else ' AVX2' if 'avx2' in flags else ''
    row = {'device': name + features, 'threads': torch.get_num_threads(), 'torch': torch.__version__}
    for package in ('numba', 'llvmlite'):
        row[package] = importlib.metadata.version(package)
    root = Path(__file__).resolve().parents[2]
    try:
        git = subprocess.run(['git', 'describe', '--always', '--dirty'], cwd=root, capture_output=True, text=True)
        commit = git.stdout.strip()
    except OSError:  # no git here
        commit = ''
    return row | {'commit': commit or 'unknown', 'python': platform.python_version()}


def load_yardstick(path: Path | None) -> tuple[str, Callable]:
    if path is None:
        return 'cases.yardstick', cases.yardstick
    spec = importlib.util.spec_from_file_location('yardstick', path)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return path.name, module.loop_scan


def check(loop: Callable) -> None:
    """The numerics of what is about to be timed; raises SystemExit with the list of what is off."""
    found = cases.problems(NUMERICS, 'numba')
    x = {name: value.float() for name, value in cases.make_inputs(NUMERICS).items()}
    first = [x[name].mT.contiguous() if x[name].dim() == 3 else x[name] for name in 'u dt A B C D z dt_bias'.split()]
    off = (loop(*first) - selective_scan_fn(*first, delta_softplus=True)).abs().max().item()
    if not off < 1e-4:
        found.append(f'the loop differs by {off:.2e}')
    if found:
        raise SystemExit('no times, because the numerics are off: ' + '; '.join(found))


def median_times(sides: dict[str, Callable], repeats: int) -> dict[str, float]:
    """Seconds per call; the sides take turns, after one call each to warm up."""
    times = {name: [] for name in sides}
    for turn in range(repeats + 1):
        for name, call in sides.items():
            start = time.perf_counter()
            call()
            if turn:
                times[name].append(time.perf_counter() - start)
    return {name: statistics.median(values) for name, values in times.items()}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument('--yardstick', type=Path, help='file whose loop_scan is timed instead of the built-in loop')
    parser.add_argument('--batch', type=int, default=1)
    parser.add_argument('--length', type=int, nargs='+', default=[197, 1024, 4096])
    parser.add_argument('--dim', type=int, default=384)
    parser.add_argument('--state', type=int, default=16)
    parser.add_argument('--repeats', type=int, default=5)
    parser.add_argument('--threads', type=int, help='default: what PyTorch chooses')
    parser.add_argument('--json', type=Path)
    args = parser.parse_args()
    if args.threads:
        torch.set_num_threads(args.threads)
    loop_name, loop = load_yardstick(args.yardstick)
    check(loop)
    about = machine()
    print(', '.join(f'{key} {value}' for key, value in about.items()), f', loop {loop_name}', sep='')
    rows = []
    for length in args.length:
        rows += time_length(args, length, loop)
        for row in rows[-6:]:
            print(
                f'{row["what"]:25} B={args.batch} L={length} D={args.dim} N={args.state}: '
                f'loop {row["loop_ms"]:.1f} ms ({row["loop_ns"]:.2f} ns per state update), '
                f'numba {row["numba_ms"]:.2f} ms ({row["numba_ns"]:.3f} ns), ratio {row["ratio"]:.1f}'
            )
    if args.json:
        args.json.write_text(json.dumps([about | {'loop': loop_name} | row for row in rows], indent=1) + '\n')


def time_length(args: argparse.Namespace, length: int, loop: Callable) -> list[dict]:
    torch.manual_seed(0)
    batch, dim, n = args.batch, args.dim, args.state
    u, z = torch.randn(2, batch, length, dim)
    dt = 0.5 * torch.randn(batch, length, dim) - 3
    B, C = torch.randn(2, batch, length, n)
    A = -torch.arange(1.0, n + 1).repeat(dim, 1)
    ours = [u, dt, A, B, C, torch.ones(dim), z, torch.zeros(dim)]
    loops = [x.mT.contiguous() if x.dim() == 3 else x.clone() for x in ours]
    both = [x.clone() if x is z else torch.stack([x, x]) for x in ours]

    def train(call: Callable, values: list[torch.Tensor]) -> tuple[Callable, Callable]:
        """Backward alone, on a graph that is kept, and forward with backward."""
        leaves = [x.clone().requires_grad_() for x in values]
        y = call(*leaves)
        dy = torch.ones_like(y)
        return (
            lambda: torch.autograd.grad(y, leaves, dy, retain_graph=True),
            lambda: torch.autograd.grad(call(*leaves), leaves, dy),
        )

    def scan(*values: torch.Tensor) -> torch.Tensor:
        return selective_scan(*values, dt_softplus=True, backend='numba')

    def scan_both(*values: torch.Tensor) -> torch.Tensor:
        return bidirectional_selective_scan(*values, dt_softplus=True, backend='numba')

    with torch.inference_mode():
        forward = median_times(
            {'loop': lambda: loop(*loops), 'one': lambda: scan(*ours), 'both': lambda: scan_both(*both)}, args.repeats
        )
    trained = {'loop': train(loop, loops), 'one': train(scan, ours), 'both': train(scan_both, both)}
    backward, training = (
        median_times({name: calls[i] for name, calls in trained.items()}, args.repeats) for i in range(2)
    )
    updates = batch * length * dim * n
    rows = []
    for what, loop_s, ours_s, directions in (
        ('forward', forward['loop'], forward['one'], 1),
        ('forward, both directions', 2 * forward['loop'], forward['both'], 2),
        ('backward', backward['loop'], backward['one'], 1),
        ('backward, both directions', 2 * backward['loop'], backward['both'], 2),
        ('forward+backward', training['loop'], training['one'], 1),
        ('fwd+bwd, both directions', 2 * training['loop'], training['both'], 2),
    ):
        rows.append(
            {
                'what': what,
                'B': batch,
                'L': length,
                'D': dim,
                'N': n,
                'loop_ms': loop_s * 1e3,
                'numba_ms': ours_s * 1e3,
                'ratio': loop_s / ours_s,
                'loop_ns': loop_s / (directions * updates) * 1e9,
                'numba_ns': ours_s / (directions * updates) * 1e9,
            }
        )
    return rows


if __name__ == '__main__':
    main()
