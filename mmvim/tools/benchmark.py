"""Speed and memory of backbones by resolution: what tools/benchmark.py measures and keeps."""

import argparse
import csv
import dataclasses
import gc
import hashlib
import json
import os
import statistics
import subprocess
import sys
from collections import defaultdict
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from mmengine.utils import ProgressBar
from torch import Tensor, nn

from mmvim.errors import InputError, first_line
from mmvim.machine import clock, device_name, forget_peak, peak_rss_mib, return_freed_memory, versions
from mmvim.tools.backbones import build, model_config, out_of_memory
from mmvim.tools.benchmark_report import CELL, FORMATS, PLOTS, add_ratios, curves, draw, place, summary
from mmvim.tools.flop_counter import hollow

__all__ = ['Sweep', 'add_ratios', 'build', 'curves', 'main', 'model_config', 'parser', 'runner']
WARM_UP_SIZE = 224  # pixels of the pass whose memory counts as the process's own
DTYPES = {'float32': torch.float32, 'bfloat16': torch.bfloat16, 'float16': torch.float16}
ROWS, TABLE = 'benchmark.json', 'benchmark.csv'


@dataclasses.dataclass(frozen=True)
class Cell:
    """One measurement of all models: a point on the horizontal axis of the plots."""

    resolution: int
    batch_size: int
    fpn: bool

    @property
    def work(self) -> int:
        """What the progress bar counts for a model: about the pixels."""
        return -(-self.batch_size * self.resolution**2 // 1000)


def runner(model: nn.Module, x: Tensor, train: bool, autocast: torch.dtype | None) -> Callable[[], None]:
    """A call of the model: a forward pass without gradients, or a forward and backward pass."""
    model.train(train)

    def call() -> None:
        with torch.autocast(x.device.type, dtype=autocast or torch.bfloat16, enabled=autocast is not None):
            y = model(x)
        if train:
            model.zero_grad(set_to_none=True)
            outputs = y if isinstance(y, tuple | list) else (y,)
            sum(out.float().square().mean() for out in outputs).backward()

    return call if train else torch.inference_mode()(call)


@contextmanager
def _recorded(failed: dict[str, str], label: str) -> Iterator[None]:
    """Within it, too little memory is a result of the model of this label."""
    try:
        yield
    except (RuntimeError, MemoryError) as error:
        if not out_of_memory(error):
            raise
        failed[label] = 'out of memory'


class Sweep:
    """Measures every model in every cell, keeping each finished cell on disk.

    Args:
        args: the command line of tools/benchmark.py.
        check: whether earlier rows are read and every model is tried at every resolution.

    Raises:
        InputError: before anything is measured, if a model, device, resolution or file cannot be used.
    """

    def __init__(self, args: argparse.Namespace, check: bool = True) -> None:
        self.args = args
        if not args.models:
            raise InputError('nothing to measure: name a model')
        for name in ('resolutions', 'batch_sizes', 'repeats', 'warmup', 'threads'):
            given, least = getattr(args, name), 0 if name == 'warmup' else 1
            lowest = min(given) if isinstance(given, list) else given
            if lowest is not None and lowest < least:
                must = 'positive' if least else 'zero or more'
                raise InputError(f'--{name.replace("_", "-")}: {lowest} is not {must}')
        self.device = find_device(args.device)
        if args.threads:
            torch.set_num_threads(args.threads)
        self.models = self._find_models()
        self.baseline = self._find_baseline(args.baseline)
        self.cells = [
            Cell(resolution, batch, fpn)
            for fpn in {'no': (False,), 'yes': (True,), 'both': (False, True)}[args.fpn]
            for resolution in dict.fromkeys(args.resolutions)
            for batch in dict.fromkeys(args.batch_sizes)
        ]
        self.settings = dict(
            device=device_name(self.device),
            dtype=args.dtype,
            mode='training' if args.train else 'inference',
            threads=torch.get_num_threads(),
            autocast=not args.no_autocast,
            warmup=args.warmup,
            repeats=args.repeats,
        )
        if check:
            self.out = Path(args.out)
            self.rows = self._earlier_rows()
            tried = [(cell.resolution, cell.fpn) for cell in self.cells]
            if self.device.type != 'cuda' and not args.no_memory:
                tried += [(WARM_UP_SIZE, cell.fpn) for cell in self.cells]
            for label in self.models:
                for resolution, fpn in dict.fromkeys(tried):
                    self._can_take(label, resolution, fpn)

    def _find_models(self) -> dict[str, tuple]:
        """By label what starts a model again, spec and attention, and its config."""
        found = {}
        for attention in ('sdpa', 'materialized') if self.args.attention == 'both' else (self.args.attention,):
            for spec in self.args.models:
                label, *config = model_config(spec, attention)
                known = found.setdefault(label, (spec, attention, *config))
                if list(known[2:]) != config:
                    raise InputError(
                        f"models '{known[0]}' and '{spec}' would both be called '{label}': rename one of the files"
                    )
        return found

    def _find_baseline(self, name: str | None) -> str:
        found = [label for label in self.models if name is None or label == name or label.startswith(f'{name} ')]
        if not found:
            raise InputError(f'--baseline {name}: not one of the measured models {", ".join(self.models)}')
        return found[0]

    def _can_take(self, label: str, resolution: int, fpn: bool) -> None:
        """Makes a pass without values, or for models that look at values a real one."""
        _, _, backbone, neck, scope = self.models[label]
        shape = min(self.args.batch_sizes), 3, resolution, resolution

        def make() -> nn.Module:
            return build(backbone, neck, scope, fpn, resolution)

        def trial(model: Any) -> None:
            x = torch.ones(shape, device=next(model.parameters()).device)
            model.train(self.args.train)
            if fpn:
                model, pyramid = model
                x = model(x)
                if any(y.ndim != 4 for y in (x if isinstance(x, tuple | list) else (x,))):
                    raise ValueError(
                        "the backbone gives no maps for --fpn, see its options (ours: ':out_type=featmap')"
                    )
                model = pyramid
            model(x)

        try:
            model: Any = hollow(make)
            with torch.no_grad(), next(model.parameters()).fake_mode:
                trial(model)
            return
        except Exception:  # of the model or of the pass without values: a real one decides
            pass
        try:
            with torch.no_grad():
                trial(make().to(self.device))
        except Exception as error:
            if out_of_memory(error):  # a result
                return
            what = '' if isinstance(error, InputError) else f' cannot take images of {resolution} px'
            memory = '' if resolution in self.args.resolutions else ' (before memory is measured: see --no-memory)'
            raise InputError(f'{label}{what}: {first_line(error)}{memory}') from error

    def _earlier_rows(self) -> list[dict]:
        path = self.out / ROWS
        existing = next(folder for folder in (self.out.absolute(), *self.out.absolute().parents) if folder.exists())
        if not existing.is_dir():
            raise InputError(f'--out {self.out}: {existing} is a file; give a folder')
        if not path.exists():
            return []
        if not self.args.resume:
            raise InputError(f'{path} exists: continue it with --resume, or give another folder with --out')
        try:
            rows = json.loads(path.read_text())
            if not isinstance(rows, list):
                raise ValueError('not a list of rows')
            for row in rows:
                if not isinstance(row['model'], str) or any(type(row[name]) is not kind for name, kind in CELL.items()):
                    raise ValueError('a row has another type than was written')
                if not all(isinstance(row.get(name), int | float | None) for name in ('latency_ms', 'memory_mib')):
                    raise ValueError('a figure is not a number')
        except (OSError, ValueError, TypeError, KeyError, AttributeError) as error:
            raise InputError(
                f'{path} holds no rows of this tool ({first_line(error)}): remove it, or give another folder with --out'
            ) from error
        return rows

    def _config(self, label: str) -> str:
        """Few letters that change with the model's config."""
        text = json.dumps(self.models[label][2:], sort_keys=True, default=str)
        return hashlib.sha256(text.encode()).hexdigest()[:12]

    def present(self, rows: list[dict]) -> list[dict]:
        """Rows of the present settings and of the present configs of the models."""
        configs = {label: self._config(label) for label in self.models}
        return [
            row
            for row in rows
            if self.settings.items() <= row.items() and configs.get(row['model']) in (None, row.get('config'))
        ]

    def run(self) -> list[dict]:
        """Measures what is missing and returns all rows; files and plots are up to date after every cell."""
        about = self.settings | versions()
        done = {
            place(row, 'model')
            for row in self.present(self.rows)
            if (row.get('latency_ms') or row.get('error')) and (self.args.no_memory or 'memory_mib' in row)
        }
        missing = {}
        for cell in self.cells:
            here = dataclasses.asdict(cell) | self.settings
            labels = [label for label in self.models if place(here | dict(model=label), 'model') not in done]
            if labels:
                missing[cell] = labels
        print(
            f'{len(missing)} of {len(self.cells)} cells to measure: ' + ', '.join(f'{k} {v}' for k, v in about.items())
        )
        try:
            self.out.mkdir(parents=True, exist_ok=True)
        except OSError as error:
            raise InputError(f'--out {self.out}: {error.strerror}; give another folder') from error
        if missing:
            bar = ProgressBar(sum(cell.work * len(labels) for cell, labels in missing.items()), file=sys.stdout)
        for cell, labels in missing.items():
            for row in self._measure(cell, labels):
                row = about | dataclasses.asdict(cell) | row | dict(config=self._config(row['model']))
                self.rows = [other for other in self.rows if place(other, 'model') != place(row, 'model')] + [row]
                bar.update(cell.work)
            self._write()
        if missing:
            print()
        self._write()
        return self.rows

    def _measure(self, cell: Cell, labels: list[str]) -> Iterator[dict]:
        times, failed = self._times(cell, labels)
        for label in labels:
            row: dict[str, object] = dict(model=label, error=failed.get(label))
            if label not in failed:
                median = statistics.median(times[label])
                row |= dict(
                    latency_ms=1e3 * median,
                    fastest_ms=1e3 * min(times[label]),
                    slowest_ms=1e3 * max(times[label]),
                    images_per_second=cell.batch_size / median,
                )
            if not self.args.no_memory:
                memory = self._memory(cell, label)
                row |= dict(memory_mib=memory, memory_above_px=0 if self.device.type == 'cuda' else WARM_UP_SIZE)
                if memory is None:
                    row['error'] = row['error'] or 'out of memory'
            yield row

    def _call(self, cell: Cell, label: str, resolution: int | None = None) -> Callable[[], None]:
        _, _, backbone, neck, scope = self.models[label]
        side, dtype = resolution or cell.resolution, DTYPES[self.args.dtype]
        model = build(backbone, neck, scope, cell.fpn, side).to(self.device)
        x = torch.randn(cell.batch_size, 3, side, side, device=self.device)
        if self.args.no_autocast:
            return runner(model.to(dtype), x.to(dtype), self.args.train, None)
        return runner(model, x, self.args.train, None if dtype == torch.float32 else dtype)

    def _times(self, cell: Cell, labels: list[str]) -> tuple[dict[str, list[float]], dict[str, str]]:
        """Seconds of every repeat; the models take turns, after warm-up calls of their own.

        `torch.utils.benchmark.Timer` measures one statement after the other, with two more calls before each.
        """
        calls, times, failed = {}, defaultdict(list), {}
        for label in labels:
            with _recorded(failed, label):
                calls[label] = self._call(cell, label)
                for _ in range(self.args.warmup):
                    calls[label]()
        for _ in range(self.args.repeats):
            for label in labels:
                if label in failed:
                    calls.pop(label, None)  # frees its memory for the others
                    continue
                with _recorded(failed, label):
                    start = clock(self.device)
                    calls[label]()
                    times[label].append(clock(self.device) - start)
        calls.clear()
        gc.collect()
        if self.device.type == 'cuda':
            torch.cuda.empty_cache()
        return times, failed

    def _memory(self, cell: Cell, label: str) -> float | None:
        """Peak MiB of one call over what was there before it, None if there was not enough memory.

        On a CPU a process of its own is measured.
        """
        if self.device.type == 'cuda':
            try:
                call = self._call(cell, label)
                torch.cuda.reset_peak_memory_stats(self.device)
                before = torch.cuda.memory_allocated(self.device)
                call()
                return (torch.cuda.max_memory_allocated(self.device) - before) / 2**20
            except torch.OutOfMemoryError:
                return None
            finally:
                gc.collect()
                torch.cuda.empty_cache()
        spec, attention, *_ = self.models[label]
        options = {
            'attention': attention,
            'resolutions': cell.resolution,
            'batch-sizes': cell.batch_size,
            'dtype': self.args.dtype,
            'threads': torch.get_num_threads(),
            'device': self.device,
            'fpn': 'yes' if cell.fpn else 'no',
        }
        command = [sys.executable, '-W', 'ignore', '-m', 'mmvim.tools.benchmark', spec]
        command += [text for name, value in options.items() for text in (f'--{name}', str(value))]
        command += ['--train'] * self.args.train + ['--no-autocast'] * self.args.no_autocast
        done = subprocess.run(
            command, capture_output=True, text=True, env=os.environ | {'PYTHONPATH': os.pathsep.join(sys.path)}
        )
        if done.returncode in (-9, 137) or "can't allocate memory" in done.stderr or 'MemoryError' in done.stderr:
            return None
        if done.returncode:
            raise RuntimeError(f'measuring the memory of {label} failed:\n{done.stderr}')
        return float(done.stdout.split()[-1])

    def memory_here(self) -> float:
        """MiB by which a call raises this process's resident set, at its peak, over that after a call at 224 px.

        Model and image are there before, so that it is the call's own memory.
        """
        (cell,), (label,) = self.cells, self.models
        self._call(cell, label, WARM_UP_SIZE)()
        call = self._call(cell, label)
        gc.collect()
        return_freed_memory()
        before = forget_peak()
        call()
        return peak_rss_mib() - before

    def _write(self) -> None:
        rows = add_ratios(self.rows, self.baseline)
        temporary = self.out / f'{ROWS}.tmp'  # a sweep that is broken off leaves the last whole file
        temporary.write_text(json.dumps(rows, indent=1) + '\n')
        temporary.replace(self.out / ROWS)
        with open(self.out / TABLE, 'w', newline='') as file:
            writer = csv.DictWriter(file, list(dict.fromkeys(name for row in rows for name in row)))
            writer.writeheader()
            writer.writerows(rows)
        draw(self.present(rows), self.out)


def find_device(name: str | None) -> torch.device:
    """The named device; by default a GPU if there is one.

    Raises:
        InputError: if there is no such device.
    """
    if name is None:
        name = 'cuda' if torch.cuda.is_available() else 'cpu'
    try:
        device = torch.device(name)
        torch.empty(1, device=device)
    except (RuntimeError, AssertionError) as error:
        raise InputError(f'--device {name}: {first_line(error)}; cpu always works') from error
    return device


def parser() -> argparse.ArgumentParser:
    """Arguments of tools/benchmark.py."""
    parser = argparse.ArgumentParser(
        description='Measure speed and memory of backbones by resolution. All models take turns; medians are reported.'
    )
    add = parser.add_argument
    add(
        'models', nargs='*', default=['vim-tiny', 'deit-tiny'], help='names, or paths of configs (default: %(default)s)'
    )
    add('--resolutions', type=int, nargs='+', default=[224, 512, 640, 738, 1024, 1248], help='sides in pixels')
    add('--batch-sizes', type=int, nargs='+', default=[1], help='images in a batch (default: 1)')
    add('--dtype', choices=DTYPES, default='float32', help='float32, or the dtype of autocast')
    add('--no-autocast', action='store_true', help='convert parameters and images to --dtype instead of autocast')
    add('--train', action='store_true', help='time forward and backward passes')
    add('--fpn', choices=['no', 'yes', 'both'], default='no', help='with the neck of the config, or a pyramid')
    add('--attention', choices=['sdpa', 'materialized', 'both'], default='sdpa', help='of transformers of this package')
    add('--baseline', help='model that ratios refer to (default: the first)')
    add('--device', help='cpu, cuda, cuda:1, ... (default: a GPU if there is one)')
    add('--threads', type=int, help='CPU threads (default: what PyTorch chooses)')
    add('--warmup', type=int, default=1, help='calls before timing (default: %(default)s)')
    add('--repeats', type=int, default=5, help='timed calls (default: %(default)s)')
    add(
        '--no-memory',
        action='store_true',
        help='leave out memory: the peak during a call over what was there just before, so without model and image; '
        f"on a GPU by PyTorch's allocator, on a CPU by the resident set of a process of its own after a pass at "
        f'{WARM_UP_SIZE} px, which says something at larger sizes alone',
    )
    add('--out', default='work_dirs/benchmark', help='folder of the results (default: %(default)s)')
    add('--resume', action='store_true', help='keep what an earlier run measured and continue')
    return parser


def main(args: argparse.Namespace) -> None:
    """Runs a sweep and says where its files are."""
    sweep = Sweep(args)
    rows = add_ratios(sweep.run(), sweep.baseline)
    print(summary(sweep.present(rows)))
    files = [ROWS, TABLE, *(f'{name}.{suffix}' for name in PLOTS for suffix in FORMATS)]
    print(f'{sweep.out}: ' + ', '.join(file for file in files if (sweep.out / file).exists()))


if __name__ == '__main__':  # the process whose memory a sweep measures
    print(Sweep(parser().parse_args(), check=False).memory_here())
