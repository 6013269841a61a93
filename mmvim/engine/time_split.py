"""Where the time of a test goes: from the data loader over the parts of the model to the metric."""

import functools
import json
import statistics
from collections import Counter, defaultdict
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path

import torch
from mmengine.dist import is_main_process
from mmengine.hooks import Hook
from mmengine.runner import Runner
from torch import nn

from mmvim.arguments import check_numbers
from mmvim.engine.hooks import unwrapped
from mmvim.errors import ConfigError
from mmvim.machine import clock, device_name, versions
from mmvim.registry import HOOKS
from mmvim.tables import table

DATA, PREPROCESSING, POST, METRIC, REST = 'data', 'preprocessing', 'post-processing', 'metric', 'rest'
# What the hosts call the making of results from a head's raw outputs.
POST_METHODS = ('predict_by_feat', '_get_predictions', 'postprocess_result', 'add_pred_to_datasample')
FILE = 'time_split.json'


class Stopwatch:
    """Adds every moment to one row: what runs inside something else does not count there.

    Args:
        device: whose work is waited for whenever the row changes.
    """

    def __init__(self, device: torch.device) -> None:
        self.device, self.stack = device, [REST]
        self.rows: dict[str, float] = defaultdict(float)
        self.last = clock(device)

    def lap(self) -> None:
        """Add the time since the last change to the current row."""
        now = clock(self.device)
        self.rows[self.stack[-1]] += now - self.last
        self.last = now

    def enter(self, row: str) -> None:
        """Begin a row inside the current one."""
        self.lap()
        self.stack.append(row)

    def leave(self) -> None:
        """Go back to the enclosing row."""
        self.lap()
        self.stack.pop()

    def timed(self, row: str, function: Callable) -> Callable:
        """The function, its time given to the row."""

        @functools.wraps(function)
        def call(*args, **kwargs):
            self.enter(row)
            try:
                return function(*args, **kwargs)
            finally:
                self.leave()

        return call


@HOOKS.register_module()
class TimeSplitHook(Hook):
    """Split the time per image of a test, print it as a table and write it to ``time_split.json`` beside the log.

    Rows are the wait for the data loader, the preprocessor, every child of the model by its name, what makes results
    of raw outputs (``predict_by_feat`` of the heads and its like: decoding, NMS, masks, resizing of score maps), the
    metric's part for each image, and the rest. They add up to the time from image to image. Nothing is touched unless
    a test runs, and all is put back after it.

    Args:
        warmup: batches at the start that are left out.

    Raises:
        ConfigError: if the test set has no batch beyond those.
    """

    priority = 'LOWEST'  # what other hooks do for an image belongs to it

    def __init__(self, warmup: int = 1) -> None:
        check_numbers(0, warmup=warmup)
        self.warmup = warmup

    def before_test_epoch(self, runner: Runner) -> None:
        """Put the stopwatch into the model and the evaluator."""
        batches = len(runner.test_dataloader)
        if batches <= self.warmup:
            raise ConfigError(
                f'the time of {batches} batches cannot be split with {self.warmup} of them left out: use more images, '
                'or a lower warmup of mmvim.TimeSplitHook (--profile 0)'
            )
        model = unwrapped(runner.model)
        parameter = next(model.parameters(), None)
        self.watch = Stopwatch(torch.device('cpu') if parameter is None else parameter.device)
        self.names, self.wrapped = [], []
        for row, owner, method in _timed_methods(model):
            self._wrap(row, owner, method)
        self._wrap(METRIC, runner.test_loop.evaluator, 'process')
        self.batches, self.sizes, self.found, self.shapes = [], [], [], Counter()
        self.watch.enter(DATA)

    def _wrap(self, row: str, owner: object, method: str) -> None:
        self.wrapped.append((owner, method, vars(owner).get(method)))
        setattr(owner, method, self.watch.timed(row, getattr(owner, method)))
        if row not in self.names:
            self.names.append(row)

    def before_test_iter(self, runner: Runner, batch_idx: int, data_batch: dict | tuple | list | None = None) -> None:
        """End the wait for the batch."""
        self.watch.leave()

    def after_test_iter(
        self,
        runner: Runner,
        batch_idx: int,
        data_batch: dict | tuple | list | None = None,
        outputs: Sequence | None = None,
    ) -> None:
        """Keep the batch's rows, and wait for the next."""
        self.watch.lap()
        if batch_idx >= self.warmup:
            self.batches.append(self.watch.rows)
            self.sizes.append(len(outputs))
            for sample in outputs:
                meta = getattr(sample, 'metainfo', {})
                self.shapes[tuple(meta.get('batch_input_shape') or meta.get('img_shape') or ())] += 1
                if 'pred_instances' in sample:
                    self.found.append(len(sample.pred_instances))
        self.watch.rows = defaultdict(float)
        self.watch.enter(DATA)

    def after_test_epoch(self, runner: Runner, metrics: dict[str, float] | None = None) -> None:
        """Take the stopwatch out, print the table and write the file."""
        self.watch.leave()
        for owner, method, before in reversed(self.wrapped):
            delattr(owner, method) if before is None else setattr(owner, method, before)
        if not is_main_process():
            return
        found = self.result(runner)
        path = Path(runner.log_dir) / FILE
        path.write_text(json.dumps(found, indent=1) + '\n')
        runner.logger.info(f'time of a test\n{describe(found)}\nfull results: {path}')

    def result(self, runner: Runner) -> dict:
        """What was measured: ``rows`` with milliseconds per image, and what they depend on."""
        parts = [name for name in self.names if name not in (POST, METRIC)]
        rows = {}
        for name in (DATA, *parts, POST, METRIC, REST):
            rows[name] = [1e3 * rows[name] / size for rows, size in zip(self.batches, self.sizes, strict=True)]
        total = [sum(values) for values in zip(*rows.values(), strict=True)]
        loader = runner.test_dataloader
        return dict(
            config=getattr(runner.cfg, 'filename', None),
            checkpoint=runner._load_from,
            device=device_name(self.watch.device),
            threads=torch.get_num_threads(),
            **versions(),
            images=sum(self.sizes),
            batch_size=max(self.sizes),
            warmup_batches=self.warmup,
            loader_workers=loader.num_workers,
            image_shapes={'x'.join(map(str, shape)): number for shape, number in self.shapes.items()},
            instances_per_image=statistics.mean(self.found) if self.found else None,
            rows={name: _summary(values, total) for name, values in rows.items() if any(values)},
            total=_summary(total, total),
            after_the_last_image_s=self.watch.rows[DATA],
        )


def _timed_methods(model: nn.Module) -> Iterator[tuple[str, object, str]]:
    """Row, owner and name of every method to be timed."""
    for name, child in model.named_children():
        row = PREPROCESSING if name == 'data_preprocessor' else name
        for part in child if isinstance(child, nn.ModuleList) else [child]:
            for method in ('forward', 'predict'):
                if callable(getattr(part, method, None)):
                    yield row, part, method
    for module in model.modules():
        for method in POST_METHODS:
            if callable(getattr(module, method, None)):
                yield POST, module, method


def _summary(values: list[float], total: list[float]) -> dict[str, float | list[float]]:
    return dict(
        mean_ms=statistics.mean(values),
        share=sum(values) / sum(total),
        median_ms=statistics.median(values),
        fastest_ms=min(values),
        slowest_ms=max(values),
        each_ms=values,
    )


def describe(found: dict) -> str:
    """A result as a table for the terminal."""
    header = ('ms per image', 'mean', 'share', 'median', 'fastest', 'slowest')
    rows = [
        (name, f'{row["mean_ms"]:.1f}', f'{row["share"]:.1%}')
        + tuple(f'{row[key]:.1f}' for key in ('median_ms', 'fastest_ms', 'slowest_ms'))
        for name, row in [*found['rows'].items(), ('total', found['total'])]
    ]
    shapes = ', '.join(found['image_shapes'])
    about = f'{found["images"]} images of {shapes}, {found["batch_size"]} in a batch, after {found["warmup_batches"]} '
    about += f'batches of warm-up; {found["device"]}, {found["threads"]} threads'
    about += '' if found['checkpoint'] else '; random weights'
    if found['instances_per_image'] is not None:
        about += f'; {found["instances_per_image"]:.1f} instances found in an image'
    data = f'{DATA} is the wait for the loader, '
    workers = found['loader_workers']
    data += f'whose {workers} processes work ahead' if workers else 'which works in the same process'
    data += f'; after the last image came {found["after_the_last_image_s"]:.2f} s for the metrics'
    return '\n'.join([table(header, rows), about, data])
