"""Speed and memory of backbones by resolution: what tools/benchmark.py measures, keeps and draws."""

from __future__ import annotations

import argparse
import csv
import dataclasses
import gc
import hashlib
import json
import os
import re
import statistics
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from copy import deepcopy
from pathlib import Path

import torch
from mmengine.config import Config, DictAction
from mmengine.registry import MODELS, init_default_scope
from mmengine.utils import ProgressBar
from torch import Tensor, nn

import mmvim.registry  # noqa: F401
from mmvim.compat.lookup import HOSTS
from mmvim.compat.types import kind_of
from mmvim.config.completion import complete_config
from mmvim.config.reading import read_config
from mmvim.errors import ConfigError, InputError, first_line
from mmvim.machine import (
    device_name,
    forget_peak,
    peak_rss_mib,
    return_freed_memory,
    synchronize,
    versions,
)
from mmvim.tools.flops import hollow

WARM_UP_SIZE = 224  # pixels of the pass whose memory counts as the process's own
DTYPES = {'float32': torch.float32, 'bfloat16': torch.bfloat16, 'float16': torch.float16}
ROWS, TABLE, PLOTS = 'benchmark.json', 'benchmark.csv', ('speed', 'memory')
# What rows must share to be compared.
SETTINGS = ('device', 'dtype', 'mode', 'threads', 'autocast', 'warmup', 'repeats')
CELL = dict(resolution=int, batch_size=int, fpn=bool)
RATIOS = ('baseline', 'speed_ratio', 'memory_ratio')


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
    if scope not in (*HOSTS, 'mmvim') or not kind:
        return False
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

    @property
    def work(self) -> int:
        """What the progress bar counts for a model: about the pixels."""
        return -(-self.batch_size * self.resolution**2 // 1000)


def model_config(spec: str, attention: str) -> tuple[str, dict, dict | list | None, str | None]:
    """What a model's name or config file stands for.

    Args:
        spec: a name of ``named_models``, with options behind a colon ('deit-tiny:attention=materialized'), a backbone
            of a host or of timm with its options ('mmdet.ResNet:depth=50,out_indices=(2,3)'), or the path of a config,
            also one of a host ('mmdet::retinanet/retinanet_r50_fpn_1x_coco.py').
        attention: 'sdpa' or 'materialized', for models that have the choice and do not name it.

    Returns:
        Label, backbone config, neck config (None: the default one), default scope.

    Raises:
        ConfigError: if there is no such model.
    """
    name, *options = re.split('(?<!:):(?!:)', spec, maxsplit=1)
    if name.endswith('.py'):
        backbone, neck, scope = _parts_of_config(name)
        label = ':'.join([Path(name).stem, *options])
    elif name in named_models():
        backbone, neck, scope, label = named_models()[name], None, None, spec
    elif '::' not in name and _is_registered(name):
        backbone, neck, scope, label = dict(type=name), None, None, spec
    else:
        raise ConfigError(
            f"unknown model '{spec}': give the path of a config (.py), a host's config "
            f"(mmdet::retinanet/retinanet_r50_fpn_1x_coco.py), a host's backbone (mmdet.ResNet:depth=50), one of timm "
            f'(timm.convnext_tiny), or one of {", ".join(named_models())}'
        )
    backbone |= _options(spec, *options)
    backbone.pop('init_cfg', None)
    if _is_ours(backbone, 'VisionTransformer') and 'attention' not in backbone:
        backbone['attention'] = attention
        label = f'{label} ({attention})'
    return label, backbone, neck, scope


def _parts_of_config(path: str) -> tuple[dict, dict | list | None, str | None]:
    """Backbone, neck and default scope of a config file; a neck that only averages is no neck here."""
    if '::' in path:
        try:
            cfg = Config.fromstring(f'_base_ = {path!r}', '.py')
        except Exception as error:
            raise ConfigError(f"config '{path}' cannot be read: {first_line(error)}; check host and path") from error
    else:
        cfg = read_config(path)
    try:
        complete_config(cfg)
    except InputError:  # no classes or no data, which are no matter of the backbone
        pass
    model = cfg.get('model') or {}
    if not kind_of(model.get('backbone') or {}):
        raise ConfigError(f'{path}: its model has no backbone to measure')
    neck = model.get('neck')
    if isinstance(neck, dict) and kind_of(neck) == 'GlobalAveragePooling':
        neck = None
    return dict(model.backbone), neck, cfg.get('default_scope')


def _options(spec: str, text: str = '') -> dict:
    """KEY=VALUE,KEY=VALUE as a dict; values may have commas of their own."""
    found = {}
    for option in re.split(r',(?=\w+=)', text) if text else ():
        key, equals, value = option.partition('=')
        if not key or not equals:
            raise ConfigError(f"model '{spec}': '{option}' is no KEY=VALUE, such as mmdet.ResNet:depth=50")
        if any(value.count(left) != value.count(right) for left, right in ('()', '[]')):
            raise ConfigError(f"model '{spec}': the brackets of '{option}' do not match")
        found[key] = DictAction._parse_iterable(value)
    if isinstance(found.get('out_indices'), int):
        found['out_indices'] = (found['out_indices'],)
    return found


def _is_ours(backbone: dict, *kinds: str) -> bool:
    kind = backbone['type']
    return (kind if isinstance(kind, str) else kind.__module__).startswith('mmvim.') and kind_of(backbone) in kinds


def build(backbone: dict, neck: dict | list | None, scope: str | None, fpn: bool, resolution: int) -> nn.Module:
    """The backbone for images of this side, with its pyramid if asked.

    Raises:
        InputError: if the model cannot be built, or not for this resolution.
        MemoryError, RuntimeError: if there is not enough memory for it.
    """
    init_default_scope(scope or 'mmengine')
    backbone, name = deepcopy(backbone), kind_of(backbone)
    if _is_ours(backbone, 'VisionMamba', 'VisionTransformer'):
        backbone['img_size'] = resolution
    try:
        torch.manual_seed(0)
        if str(backbone['type']).startswith('timm.'):
            model = _timm_model(backbone.pop('type').removeprefix('timm.'), resolution, fpn, backbone)
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
        return nn.Sequential(model, MODELS.build(deepcopy(neck)))
    except Exception as error:
        if out_of_memory(error):
            raise
        with_neck = ' with a pyramid' * fpn
        raise InputError(f'{name}{with_neck} at {resolution} px cannot be built: {first_line(error)}') from error


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
        check: whether earlier rows are read and every model is tried at every resolution.

    Raises:
        InputError: before anything is measured, if a model, device, resolution or file cannot be used.
    """

    def __init__(self, args: argparse.Namespace, check: bool = True) -> None:
        self.args = args
        if not args.models:
            raise InputError('nothing to measure: name a model')
        for name, values, least in (
            ('--resolutions', args.resolutions, 1),
            ('--batch-sizes', args.batch_sizes, 1),
            ('--repeats', [args.repeats], 1),
            ('--warmup', [args.warmup], 0),
            ('--threads', [1 if args.threads is None else args.threads], 1),
        ):
            if min(values) < least:
                raise InputError(f'{name}: {min(values)} is not {"positive" if least else "zero or more"}')
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
        if name is None:
            return list(self.models)[0]
        found = [label for label in self.models if label == name or label.startswith(f'{name} ')]
        if not found:
            raise InputError(f'--baseline {name}: not one of the measured models {", ".join(self.models)}')
        return found[0]

    def _can_take(self, label: str, resolution: int, fpn: bool) -> None:
        """Makes a pass without values, or for models that look at values a real one."""
        _, _, *config = self.models[label]
        shape = min(self.args.batch_sizes), 3, resolution, resolution

        def make() -> nn.Module:
            return build(*config, fpn, resolution)

        def trial(model: nn.Module) -> None:
            x = torch.ones(shape, device=next(model.parameters()).device)
            model.train(self.args.train)
            if fpn:
                model, neck = model
                x = model(x)
                if any(y.ndim != 4 for y in (x if isinstance(x, tuple | list) else (x,))):
                    raise ValueError(
                        "the backbone gives no maps for --fpn, see its options (ours: ':out_type=featmap')"
                    )
                model = neck
            model(x)

        try:
            model = hollow(make)
            with torch.no_grad(), next(model.parameters()).fake_mode:
                trial(model)
            return
        except Exception:  # of the model or of the pass without values: a real one tells
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
            raise InputError(f'{path} exists: go on with it by --resume, or give another folder by --out')
        try:
            rows = json.loads(path.read_text())
            if not isinstance(rows, list):
                raise ValueError('not a list of rows')
            for row in rows:
                if not isinstance(row['model'], str) or any(type(row[name]) is not kind for name, kind in CELL.items()):
                    raise ValueError('a row has another type than was written')
                if not all(isinstance(row.get(name), int | float | None) for name in ('latency_ms', 'memory_mib')):
                    raise ValueError('a figure is no number')
        except (OSError, ValueError, TypeError, KeyError, AttributeError) as error:
            raise InputError(
                f'{path} holds no rows of this tool ({first_line(error)}): remove it, or give another folder by --out'
            ) from error
        return rows

    def settings(self) -> dict:
        """What two rows must share to be of one sweep."""
        args = self.args
        return dict(
            device=device_name(self.device),
            dtype=args.dtype,
            mode='training' if args.train else 'inference',
            threads=torch.get_num_threads(),
            autocast=not args.no_autocast,
            warmup=args.warmup,
            repeats=args.repeats,
        )

    def _config(self, label: str) -> str:
        """Few letters that change with the model's config."""
        text = json.dumps(self.models[label][2:], sort_keys=True, default=str)
        return hashlib.sha256(text.encode()).hexdigest()[:12]

    def present(self, rows: list[dict]) -> list[dict]:
        """Rows of the present settings and of the present configs of the models."""
        settings = self.settings()
        configs = {label: self._config(label) for label in self.models}
        return [
            row
            for row in rows
            if all(row.get(name) == value for name, value in settings.items())
            and configs.get(row['model']) in (None, row.get('config'))
        ]

    def run(self) -> list[dict]:
        """Measures what is missing and returns all rows; files and plots are up to date after every cell."""
        settings = self.settings()
        about = settings | versions()

        def place(row: dict) -> tuple:
            return (row['model'], *(row.get(name) for name in (*CELL, *settings)))

        done = {
            place(row)
            for row in self.present(self.rows)
            if (row.get('latency_ms') or row.get('error')) and (self.args.no_memory or 'memory_mib' in row)
        }
        missing = []
        for cell in self.cells:
            labels = [m for m in self.models if place(dict(model=m) | dataclasses.asdict(cell) | settings) not in done]
            if labels:
                missing.append((cell, labels))
        print(
            f'{len(missing)} of {len(self.cells)} cells to measure: ' + ', '.join(f'{k} {v}' for k, v in about.items())
        )
        try:
            self.out.mkdir(parents=True, exist_ok=True)
        except OSError as error:
            raise InputError(f'--out {self.out}: {error.strerror}; give another folder') from error
        bar = (
            ProgressBar(sum(cell.work * len(labels) for cell, labels in missing), file=sys.stdout) if missing else None
        )
        for cell, labels in missing:
            for row in self._measure(cell, labels):
                row = about | dataclasses.asdict(cell) | row | dict(config=self._config(row['model']))
                self.rows = [other for other in self.rows if place(other) != place(row)] + [row]
                bar.update(cell.work)
            self._write()
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

        def fail(label: str) -> None:
            failed[label] = 'out of memory'
            calls.pop(label, None)
            times.pop(label, None)

        for label in labels:
            try:
                calls[label] = self._call(cell, label)
                for _ in range(self.args.warmup):
                    calls[label]()
            except (RuntimeError, MemoryError) as error:
                if not out_of_memory(error):
                    raise
                fail(label)
        for _ in range(self.args.repeats):
            for label in list(calls):
                try:
                    synchronize(self.device)
                    start = time.perf_counter()
                    calls[label]()
                    synchronize(self.device)
                    times.setdefault(label, []).append(time.perf_counter() - start)
                except (RuntimeError, MemoryError) as error:
                    if not out_of_memory(error):
                        raise
                    fail(label)
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
        command = [sys.executable, '-W', 'ignore', '-m', 'mmvim.tools.benchmark', spec, '--attention', attention]
        command += ['--resolutions', str(cell.resolution), '--batch-sizes', str(cell.batch_size)]
        command += ['--dtype', self.args.dtype, '--threads', str(torch.get_num_threads())]
        command += ['--device', str(self.device)]
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
        draw(self.present(rows), self.out)


def add_ratios(rows: list[dict], baseline: str) -> list[dict]:
    """Rows with 'speed_ratio' and 'memory_ratio', the model's speed and memory over the baseline's in the same cell."""
    place = (*CELL, *SETTINGS)
    base = {tuple(row.get(name) for name in place): row for row in rows if row['model'] == baseline}
    found = []
    for row in rows:
        other = base.get(tuple(row.get(name) for name in place), {})
        ratios = {}
        if row.get('latency_ms') and other.get('latency_ms'):
            ratios['speed_ratio'] = other['latency_ms'] / row['latency_ms']
        if _value(row, 'memory_mib') and _value(other, 'memory_mib'):
            ratios['memory_ratio'] = row['memory_mib'] / other['memory_mib']
        kept = {name: value for name, value in row.items() if name not in RATIOS}
        found.append(kept | dict(baseline=baseline) | ratios)
    return found


def _value(row: dict, name: str) -> float | None:
    """A figure of a row; memory that was measured above that of a pass at some size is one at larger sizes alone."""
    value = row.get(name)
    if not value or value < 0 or (name == 'memory_mib' and row['resolution'] <= row.get('memory_above_px', 0)):
        return None
    return value


def curves(rows: list[dict], value: str) -> dict[tuple[str, bool, int], list[tuple[int, float]]]:
    """Points (resolution, value) for each model, with or without pyramid, and batch size, by the resolution."""
    lines: dict[tuple[str, bool, int], list[tuple[int, float]]] = {}
    for row in sorted(rows, key=lambda row: row['resolution']):
        if _value(row, value):
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
            for suffix in ('png', 'svg'):  # of other settings
                (folder / f'{name}.{suffix}').unlink(missing_ok=True)
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
        if _value(row, 'memory_mib'):
            text += f', {row["memory_mib"]:.0f} MiB'
        if row.get('speed_ratio'):
            text += f', {row["speed_ratio"]:.2f} times the speed of {row["baseline"]}'
        lines.append(text + (row['error'] or ''))
    return '\n'.join(lines)


def main(args: argparse.Namespace) -> None:
    """Runs a sweep and says where its files are."""
    sweep = Sweep(args)
    rows = add_ratios(sweep.run(), sweep.baseline)
    print(summary(sweep.present(rows)))
    files = [ROWS, TABLE, *(f'{name}.{suffix}' for name in PLOTS for suffix in ('png', 'svg'))]
    print(f'{sweep.out}: ' + ', '.join(file for file in files if (sweep.out / file).exists()))


if __name__ == '__main__':  # the process whose memory a sweep measures
    print(Sweep(parser().parse_args(), check=False).memory_here())
