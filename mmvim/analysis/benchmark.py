"""Speed and memory of backbones by resolution: what tools/benchmark.py measures, keeps and draws."""

from __future__ import annotations

import argparse
import csv
import dataclasses
import gc
import json
import os
import statistics
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import torch
from mmengine.utils import ProgressBar
from torch import Tensor, nn

from mmvim.compat.lookup import HOSTS
from mmvim.errors import ConfigError, InputError
from mmvim.machine import (
    device_name,
    forget_peak,
    peak_rss_mib,
    return_freed_memory,
    synchronize,
    versions,
)

WARM_UP_SIZE = 224  # pixels of the pass whose memory counts as the process's own
DTYPES = {'float32': torch.float32, 'bfloat16': torch.bfloat16, 'float16': torch.float16}
ROWS, TABLE, PLOTS = 'benchmark.json', 'benchmark.csv', ('speed', 'memory')


def _plain(kind: str, **options) -> dict:
    return dict(type=f'mmvim.{kind}', out_type='featmap', **options)


def named_models() -> dict[str, dict]:
    """Backbones by name, as dense predictors: plain ones give the last map, hierarchical ones four maps."""
    models = {}
    for size in ('tiny', 'small', 'base'):
        models[f'vim-{size}'] = _plain('VisionMamba', arch=size, cls_token=None)
        models[f'deit-{size}'] = _plain('VisionTransformer', arch=f'deit-{size}', with_cls_token=False)
        models[f'vitdet-{size}'] = models[f'deit-{size}'] | dict(window_size=14, global_attn_indexes=(2, 5, 8, 11))
        models[f'hier-vim-{size}'] = dict(type='mmvim.HierVim', arch=size, out_indices=(0, 1, 2, 3))
    for size in ('tiny', 'tiny2', 'small', 'base', 'large', 'large2', 'large3'):
        models[f'mambavision-{size}'] = dict(type='mmvim.MambaVision', arch=size, out_indices=(0, 1, 2, 3))
    return models


def _is_registered(name: str) -> bool:
    """Whether this is 'scope.Type' of a host's registry, or 'timm.name' of a model of timm."""
    scope, _, kind = name.partition('.')
    if scope == 'timm':
        try:
            import timm
        except ImportError as error:
            raise ConfigError(f'{name}: timm is not installed (pip install timm)') from error
        return timm.is_model(kind)
    if scope not in (*HOSTS, 'mmvim'):
        return False
    from mmengine.registry import MODELS

    return MODELS.get(name) is not None


def _timm_model(name: str, resolution: int, maps: bool, options: dict) -> nn.Module:
    """timm's model without its classifier; for a pyramid the maps that it offers as features."""
    import timm

    options = dict(options, pretrained=False)
    options |= dict(features_only=True) if maps else dict(num_classes=0)
    try:
        model = timm.create_model(name, img_size=resolution, **options)
    except TypeError:  # models of any size know no img_size
        model = timm.create_model(name, **options)
    if maps:
        model.out_channels = model.feature_info.channels()
    return model


@dataclasses.dataclass(frozen=True)
class Cell:
    """One measurement of all models: a point on the horizontal axis of the plots."""

    resolution: int
    batch_size: int
    fpn: bool


def model_config(spec: str, attention: str) -> tuple[str, dict, dict | None, str | None]:
    """What a model's name or config file stands for.

    Args:
        spec: a name of ``named_models``, with options behind a colon ('deit-tiny:attention=materialized'), a backbone
            of a host or of timm with its options ('mmdet.ResNet:depth=50', 'timm.swin_tiny_patch4_window7_224'), or
            the path of a config.
        attention: 'sdpa' or 'materialized', for models that have the choice and do not name it.

    Returns:
        Label, backbone config, neck config (None: the default one), default scope.

    Raises:
        ConfigError: if there is no such model.
    """
    from mmengine.config import Config, DictAction

    name, _, text = spec.partition(':')
    if name.endswith('.py'):
        from mmvim.cli import find_config
        from mmvim.engine.complete import complete_config

        cfg = Config.fromfile(find_config(name))
        complete_config(cfg)
        model = cfg.model
        if 'backbone' not in model:
            raise ConfigError(f'{name}: its model has no backbone to measure')
        backbone, neck, scope = dict(model.backbone), model.get('neck'), cfg.get('default_scope')
        label = Path(name).stem
    elif name in named_models():
        backbone, neck, scope, label = named_models()[name], None, None, spec
    elif _is_registered(name):
        backbone, neck, scope, label = dict(type=name), None, None, spec
    else:
        raise ConfigError(
            f"unknown model '{spec}': give the path of a config (.py), a host's backbone (mmdet.ResNet:depth=50), one "
            f'of timm (timm.convnext_tiny), or one of {", ".join(named_models())}'
        )
    for option in filter(None, text.split(',')):
        key, _, value = option.partition('=')
        backbone[key] = DictAction._parse_int_float_bool(value)
    backbone.pop('init_cfg', None)
    if backbone['type'] == 'mmvim.VisionTransformer':
        backbone.setdefault('attention', attention)
        if 'attention' not in text and not name.endswith('.py'):
            label = f'{label} ({backbone["attention"]})'
    return label, backbone, neck, scope


def build(backbone: dict, neck: dict | None, scope: str | None, fpn: bool, resolution: int) -> nn.Module:
    """The backbone for images of this side, with its pyramid if asked.

    Raises:
        InputError: if the model cannot be built, or not for this resolution.
    """
    from mmengine.registry import MODELS, init_default_scope

    import mmvim.registry  # noqa: F401

    init_default_scope(scope or 'mmengine')
    backbone = dict(backbone)
    if backbone['type'] in ('mmvim.VisionMamba', 'mmvim.VisionTransformer'):
        backbone['img_size'] = resolution
    try:
        torch.manual_seed(0)
        if backbone['type'].startswith('timm.'):
            name = backbone.pop('type')
            model = _timm_model(name.removeprefix('timm.'), resolution, fpn, backbone)
        else:
            model = MODELS.build(backbone)
        if not fpn:
            return model
        if neck is None:
            channels = _channels(model, resolution)
            if len(channels) == 1:
                neck = dict(type='mmvim.SimpleFPN', in_channels=channels[0], out_channels=256, num_outs=5)
            else:
                neck = dict(type='mmdet.FPN', in_channels=channels, out_channels=256, num_outs=5)
        return nn.Sequential(model, MODELS.build(dict(neck)))
    except (TypeError, ValueError, KeyError) as error:
        raise InputError(f'{backbone["type"]} at {resolution} px: {error}') from error


@torch.inference_mode()
def _channels(model: nn.Module, resolution: int) -> list[int]:
    """Channels of each map; a backbone that does not say so is asked by an image."""
    if hasattr(model, 'out_channels'):
        return list(model.out_channels)
    model.eval()  # returns nothing in some backbones of hosts
    return [y.shape[1] for y in model(torch.randn(1, 3, resolution, resolution))]


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

    if train:
        return call
    return torch.inference_mode()(call)


def out_of_memory(error: Exception) -> bool:
    """Whether the allocator of a CPU or GPU gave up."""
    text = str(error)
    return isinstance(error, MemoryError) or 'out of memory' in text or "can't allocate memory" in text


class Sweep:
    """Measures every model in every cell, keeping each finished cell on disk.

    Args:
        args: the command line of tools/benchmark.py.

    Raises:
        InputError: before anything is measured, if a model, device, resolution or file cannot be used.
    """

    def __init__(self, args: argparse.Namespace) -> None:
        self.args = args
        self.device = find_device(args.device)
        if args.threads:
            torch.set_num_threads(args.threads)
        attentions = ('sdpa', 'materialized') if args.attention == 'both' else (args.attention,)
        self.models = {}
        for attention in attentions:
            for spec in args.models:
                label, *rest = model_config(spec, attention)
                self.models[label] = (spec, attention, *rest)
        self.baseline = self._find_baseline(args.baseline)
        self.cells = [
            Cell(resolution, batch, fpn)
            for fpn in {'no': (False,), 'yes': (True,), 'both': (False, True)}[args.fpn]
            for resolution in args.resolutions
            for batch in args.batch_sizes
        ]
        if not self.cells or not self.models:
            raise InputError('nothing to measure: --models, --resolutions and --batch-sizes need a value each')
        for name, values in (('--resolutions', args.resolutions), ('--batch-sizes', args.batch_sizes)):
            if min(values) < 1:
                raise InputError(f'{name}: {min(values)} is not positive')
        for label in self.models:
            self._can_take(label, min(args.resolutions))
        self.out = Path(args.out)
        self.rows = self._earlier_rows()

    def _find_baseline(self, name: str | None) -> str:
        if name is None:
            return list(self.models)[0]
        found = [label for label in self.models if label == name or label.startswith(f'{name} ')]
        if not found:
            raise InputError(f'--baseline {name}: not one of the measured models {", ".join(self.models)}')
        return found[0]

    def _can_take(self, label: str, resolution: int) -> None:
        """Builds the model; for a small image it also makes a pass, as that is where models fail."""
        _, _, *config = self.models[label]
        model = build(*config, False, resolution)
        if resolution >= WARM_UP_SIZE:
            return
        try:
            model.eval()
            with torch.inference_mode():
                model(torch.randn(1, 3, resolution, resolution))
        except (RuntimeError, ValueError) as error:
            raise InputError(f'{label} cannot take images of {resolution} px (--resolutions): {error}') from error

    def _earlier_rows(self) -> list[dict]:
        path = self.out / ROWS
        if not path.exists():
            return []
        if not self.args.resume:
            raise InputError(f'{path} exists: go on with it by --resume, or give another folder by --out')
        try:
            rows = json.loads(path.read_text())
        except ValueError as error:
            raise InputError(f'{path} is no JSON ({error}): remove it, or give another folder by --out') from error
        return rows

    def settings(self) -> dict:
        """What two rows must share to be of one sweep."""
        args = self.args
        return dict(
            device=device_name(self.device),
            dtype=args.dtype,
            mode='training' if args.train else 'inference',
            threads=torch.get_num_threads(),
        )

    def run(self) -> list[dict]:
        """Measures what is missing and returns all rows; files and plots are up to date after every cell."""
        settings = self.settings()
        about = settings | versions()

        def key(row: dict) -> tuple:
            return (row['model'], *(row[name] for name in ('resolution', 'batch_size', 'fpn', *settings)))

        done = {key(row) for row in self.rows}
        missing = []
        for cell in self.cells:
            labels = [m for m in self.models if key(dict(model=m) | dataclasses.asdict(cell) | settings) not in done]
            if labels:
                missing.append((cell, labels))
        print(
            f'{len(missing)} of {len(self.cells)} cells to measure: ' + ', '.join(f'{k} {v}' for k, v in about.items())
        )
        self.out.mkdir(parents=True, exist_ok=True)
        bar = ProgressBar(len(missing)) if missing else None
        for cell, labels in missing:
            for row in self._measure(cell, labels):
                self.rows.append(about | dataclasses.asdict(cell) | row)
            self._write()
            bar.update()
        if bar is not None:
            print()
        self._write()
        return self.rows

    def _measure(self, cell: Cell, labels: list[str]) -> Iterator[dict]:
        times, failed = self._times(cell, labels)
        for label in labels:
            row = dict(model=label, error=failed.get(label))
            if label in times:
                seconds = sorted(times[label])
                median = statistics.median(seconds)
                row |= dict(
                    latency_ms=1e3 * median,
                    fastest_ms=1e3 * seconds[0],
                    slowest_ms=1e3 * seconds[-1],
                    images_per_second=cell.batch_size / median,
                )
            if not self.args.no_memory:
                memory = self._memory(cell, label)
                row['memory_mib'] = memory
                row['memory_above_px'] = 0 if self.device.type == 'cuda' else WARM_UP_SIZE
                if memory is None:
                    row['error'] = row['error'] or 'out of memory'
            yield row

    def _input(self, cell: Cell, resolution: int | None = None) -> Tensor:
        side = resolution or cell.resolution
        x = torch.randn(cell.batch_size, 3, side, side, device=self.device)
        return x.to(DTYPES[self.args.dtype]) if self.args.no_autocast else x

    def _call(self, cell: Cell, label: str, resolution: int | None = None) -> Callable[[], None]:
        _, _, *config = self.models[label]
        model = build(*config, cell.fpn, resolution or cell.resolution).to(self.device)
        dtype, autocast = DTYPES[self.args.dtype], None
        if self.args.no_autocast:
            model = model.to(dtype)
        elif dtype != torch.float32:
            autocast = dtype
        return runner(model, self._input(cell, resolution), self.args.train, autocast)

    def _times(self, cell: Cell, labels: list[str]) -> tuple[dict[str, list[float]], dict[str, str]]:
        """Seconds of every repeat; the models take turns, after warm-up calls of their own."""
        calls, times, failed = {}, {}, {}
        for label in labels:
            try:
                calls[label] = self._call(cell, label)
                for _ in range(self.args.warmup):
                    calls[label]()
            except (RuntimeError, MemoryError) as error:
                if not out_of_memory(error):
                    raise
                calls.pop(label, None)
                failed[label] = 'out of memory'
        for _ in range(self.args.repeats):
            for label, call in calls.items():
                synchronize(self.device)
                start = time.perf_counter()
                call()
                synchronize(self.device)
                times.setdefault(label, []).append(time.perf_counter() - start)
        calls.clear()
        gc.collect()
        if self.device.type == 'cuda':
            torch.cuda.empty_cache()
        return times, failed

    def _memory(self, cell: Cell, label: str) -> float | None:
        """Peak MiB of one call, None if there was not enough memory. On a CPU a process of its own is measured."""
        if self.device.type == 'cuda':
            try:
                call = self._call(cell, label)
                torch.cuda.reset_peak_memory_stats(self.device)
                call()
                return torch.cuda.max_memory_allocated(self.device) / 2**20
            except torch.OutOfMemoryError:
                return None
            finally:
                gc.collect()
                torch.cuda.empty_cache()
        spec, attention, *_ = self.models[label]
        command = [sys.executable, '-W', 'ignore', '-m', 'mmvim.analysis.benchmark', spec, '--attention', attention]
        command += ['--resolutions', str(cell.resolution), '--batch-sizes', str(cell.batch_size)]
        command += ['--dtype', self.args.dtype, '--threads', str(torch.get_num_threads())]
        command += ['--fpn', 'yes' if cell.fpn else 'no'] + ['--train'] * self.args.train
        command += ['--no-autocast'] * self.args.no_autocast
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
        write_whole(self.out / ROWS, json.dumps(rows, indent=1) + '\n')
        names = list(dict.fromkeys(name for row in rows for name in row))
        with open(self.out / TABLE, 'w', newline='') as file:
            writer = csv.DictWriter(file, names)
            writer.writeheader()
            writer.writerows(rows)
        draw(rows, self.out)


def add_ratios(rows: list[dict], baseline: str) -> list[dict]:
    """Rows with 'speed_ratio' and 'memory_ratio', the model's speed and memory over the baseline's in the same cell."""
    place = ('resolution', 'batch_size', 'fpn', 'device', 'dtype', 'mode', 'threads')
    base = {tuple(row[name] for name in place): row for row in rows if row['model'] == baseline}
    found = []
    for row in rows:
        other = base.get(tuple(row[name] for name in place), {})
        ratios = {}
        if row.get('latency_ms') and other.get('latency_ms'):
            ratios['speed_ratio'] = other['latency_ms'] / row['latency_ms']
        if row.get('memory_mib') and other.get('memory_mib'):
            ratios['memory_ratio'] = row['memory_mib'] / other['memory_mib']
        found.append(row | dict(baseline=baseline) | ratios)
    return found


def curves(rows: list[dict], value: str) -> dict[tuple[str, bool, int], list[tuple[int, float]]]:
    """Points (resolution, value) for each model, with or without pyramid, and batch size, in order of the resolution.

    Memory that was measured above that of a pass at some size has points at larger sizes alone.
    """
    lines: dict[tuple[str, bool, int], list[tuple[int, float]]] = {}
    for row in sorted(rows, key=lambda row: row['resolution']):
        nothing = value == 'memory_mib' and row['resolution'] <= row.get('memory_above_px', 0)
        if (row.get(value) or 0) > 0 and not nothing:
            key = row['model'], row['fpn'], row['batch_size']
            lines.setdefault(key, []).append((row['resolution'], row[value]))
    return lines


def draw(rows: list[dict], folder: Path) -> None:
    """Two plots against the resolution, speed and memory, both on a logarithmic axis, as PNG and SVG."""
    from matplotlib.figure import Figure

    colors = {model: f'C{i}' for i, model in enumerate(dict.fromkeys(row['model'] for row in rows))}
    batches = {row['batch_size'] for row in rows}
    for name, value, title in (
        ('speed', 'images_per_second', 'images per second'),
        ('memory', 'memory_mib', 'memory, MiB'),
    ):
        lines = curves(rows, value)
        if not lines:
            continue
        figure = Figure(figsize=(7, 4.5), layout='constrained')
        axes = figure.add_subplot()
        for (model, fpn, batch), points in lines.items():
            label = model + ' + FPN' * fpn + f', batch {batch}' * (len(batches) > 1)
            style = dict(color=colors[model], marker='o', linestyle='--' if fpn else '-')
            axes.plot(*zip(*points, strict=True), **style, label=label)
        axes.set_yscale('log')
        axes.set_xlabel('side of the image, pixels')
        axes.set_ylabel(title)
        axes.set_xticks(sorted({row['resolution'] for row in rows}))
        axes.grid(alpha=0.3, which='both')
        axes.legend(fontsize='small')
        first = rows[0]
        axes.set_title(
            f'{first["device"]}, {first["threads"]} threads, {first["dtype"]}, {first["mode"]}', fontsize='small'
        )
        for suffix in ('png', 'svg'):
            figure.savefig(folder / f'{name}.{suffix}', dpi=120)


def write_whole(path: Path, text: str) -> None:
    """Replaces a file at once, so that a broken sweep leaves the last whole one."""
    temporary = path.with_suffix('.tmp')
    temporary.write_text(text)
    temporary.replace(path)


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
        raise InputError(f'--device {name}: {str(error).splitlines()[0]}; cpu always works') from error
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
    add('--no-memory', action='store_true', help='leave out memory')
    add('--out', default='work_dirs/benchmark', help='folder of the results (default: %(default)s)')
    add('--resume', action='store_true', help='keep what an earlier run measured and go on')
    return parser


def summary(rows: list[dict]) -> str:
    """The rows as a table for the terminal."""
    lines = []
    for row in rows:
        text = f'{row["resolution"]:5} px  batch {row["batch_size"]}  {row["model"]}{" + FPN" if row["fpn"] else ""}: '
        if row.get('latency_ms'):
            text += f'{row["latency_ms"]:.1f} ms ({row["fastest_ms"]:.1f} to {row["slowest_ms"]:.1f}), '
            text += f'{row["images_per_second"]:.2f} images/s'
        if row.get('memory_mib') is not None:
            text += f', {row["memory_mib"]:.0f} MiB'
        if row.get('speed_ratio'):
            text += f', {row["speed_ratio"]:.2f} times the speed of {row["baseline"]}'
        lines.append(text + (row['error'] or ''))
    return '\n'.join(lines)


def main(args: argparse.Namespace) -> None:
    """Runs a sweep and says where its files are."""
    sweep = Sweep(args)
    rows = add_ratios(sweep.run(), sweep.baseline)
    print(summary(rows))
    print(f'{sweep.out}: {ROWS}, {TABLE}, ' + ', '.join(f'{name}.png, {name}.svg' for name in PLOTS))


if __name__ == '__main__':  # the process whose memory a sweep measures
    arguments = parser().parse_args()
    arguments.out = os.devnull
    print(Sweep(arguments).memory_here())
