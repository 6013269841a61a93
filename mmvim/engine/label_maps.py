"""Checks of label maps before a run and while it reads them."""

from collections.abc import Iterable, Sequence
from functools import partialmethod

import torch
from mmengine.dist import all_reduce
from mmengine.hooks import Hook
from mmengine.runner import Runner
from torch import Tensor, nn

from mmvim.compat.label_maps import IGNORED
from mmvim.engine.hooks import head_class_counts, unwrapped
from mmvim.engine.label_scan import Legal, scan, wrong_value
from mmvim.errors import ConfigError
from mmvim.registry import HOOKS


@HOOKS.register_module()
class LabelMapHook(Hook):
    """Refuse label maps that a run cannot use, and say what it cannot learn or measure.

    Before the first iteration, training and validation data are looked through (:func:`mmvim.engine.label_scan.scan`).
    Every batch is compared with heads and metrics: in training the loss would index beyond its classes, which on a GPU
    ends the whole process. In validation and tests the host's metric would drop such pixels from the ground truth and
    yet count what is predicted there.
    """

    def __init__(self) -> None:
        self.scanned: set[str] = set()
        self.pixels: Tensor | None = None

    def before_train(self, runner: Runner) -> None:
        """Note which values the heads of the model accept, and look through the data."""
        model = unwrapped(runner.model)
        self.preprocessor = getattr(model, 'data_preprocessor', None)
        heads: dict[tuple, Legal] = {}  # one of those that accept the same, as the maps are read for each
        for name, count in head_class_counts(model):
            head = model.get_submodule(name)
            if hasattr(head, 'ignore_index'):
                heads.setdefault((count, head.ignore_index), Legal(f'model.{name}', count, head.ignore_index))
        self.heads = list(heads.values())
        if self.heads:
            check_outputs(model)
            self._scan(runner, 'train_dataloader', self.heads)
            if runner.val_loop is not None:
                self._scan(runner, 'val_dataloader', metrics_of(runner.val_evaluator, 'val_evaluator'))

    def _scan(self, runner: Runner, key: str, accepted: Sequence[Legal]) -> None:
        if key not in self.scanned:
            self.scanned.add(key)
            scan(getattr(runner, key).dataset, key, accepted, runner.logger)

    def before_train_iter(self, runner: Runner, batch_idx: int, data_batch: dict | None = None) -> None:
        """Check the label maps of a batch, and what they will be padded with, against the heads."""
        samples = labelled(data_batch)
        if not samples:
            return
        check_label_maps(samples, self.heads)
        value = getattr(self.preprocessor, 'seg_pad_val', None)
        if value is None or not _will_be_padded(self.preprocessor, [s.gt_sem_seg.shape for s in samples]):
            return
        for legal in self.heads:
            if not 0 <= value < legal.num_classes and value != legal.ignore_index:
                raise ConfigError(
                    f'label maps are padded with model.data_preprocessor.seg_pad_val={value}, but {legal}: set '
                    'seg_pad_val to the value to ignore'
                )

    def begin(self, runner: Runner, *, key: str) -> None:
        """Look through the data of a validation or test."""
        metrics = metrics_of(getattr(runner, f'{key}_evaluator'), f'{key}_evaluator')
        if metrics:
            self._scan(runner, f'{key}_dataloader', metrics)
        self.pixels = torch.zeros(metrics[0].num_classes, dtype=torch.int64) if metrics else None

    before_val_epoch = partialmethod(begin, key='val')
    before_test_epoch = partialmethod(begin, key='test')

    def check_metrics(self, runner: Runner, batch_idx: int, data_batch: dict | None = None, *, key: str) -> None:
        """Check the label maps of a batch against the metrics of the evaluator of this name, and count their pixels."""
        samples, metrics = labelled(data_batch), metrics_of(getattr(runner, key), key)
        check_label_maps(samples, metrics)
        for sample in samples if self.pixels is not None else ():
            self.pixels += metrics[0].counts(sample.gt_sem_seg.data.flatten().cpu())

    before_val_iter = partialmethod(check_metrics, key='val_evaluator')
    before_test_iter = partialmethod(check_metrics, key='test_evaluator')

    def end(self, runner: Runner, metrics: dict | None = None, *, key: str) -> None:
        """Say over which classes a metric is."""
        if self.pixels is None:
            return
        all_reduce(self.pixels)
        names = getattr(runner, f'{key}_dataloader').dataset.metainfo.get('classes') or range(len(self.pixels))
        absent = [str(name) for name, count in zip(names, self.pixels, strict=False) if not count]
        if len(absent) == len(self.pixels):
            runner.logger.warning(f'{key}: no pixel of any class in the label maps, so the metrics mean nothing')
        elif absent:
            runner.logger.warning(
                f'{key}: metrics are over {len(self.pixels) - len(absent)} of {len(self.pixels)} classes; no label map '
                f'has a pixel of {", ".join(absent[:10])}{", ..." if absent[10:] else ""}'
            )

    after_val_epoch = partialmethod(end, key='val')
    after_test_epoch = partialmethod(end, key='test')


def check_outputs(model: nn.Module) -> None:
    """Refuse a head whose softmax is over one output: its loss is 0 whatever it answers.

    Raises:
        ConfigError: naming the head.
    """
    for name, head in model.named_modules():
        if getattr(head, 'out_channels', None) != 1 or not hasattr(head, 'loss_decode'):
            continue
        losses = head.loss_decode if isinstance(head.loss_decode, nn.ModuleList) else [head.loss_decode]
        if any(type(loss).__name__ == 'CrossEntropyLoss' and not loss.use_sigmoid for loss in losses):
            raise ConfigError(
                f'nothing can be learnt: model.{name} has one output (out_channels or num_classes is 1) and a softmax '
                'over it: name the background as a class too (two classes), or set use_sigmoid=True in loss_decode '
                'with num_classes=2 and out_channels=1'
            )


def labelled(batch: object) -> list:
    """The samples of a data loader's batch that have a label map of MMSegmentation, also if they are nested."""
    samples = batch.get('data_samples') if isinstance(batch, dict) else batch
    if isinstance(samples, Sequence) and not isinstance(samples, str):
        return [found for sample in samples for found in labelled(sample)]
    label_map = getattr(samples, 'gt_sem_seg', None)
    return [samples] if label_map is not None and 'data' in label_map else []


def metrics_of(evaluator: object, key: str) -> list[Legal]:
    """Values that those metrics of an evaluator accept that compare label maps."""
    metrics = [metric for metric in getattr(evaluator, 'metrics', ()) if hasattr(metric, 'ignore_index')]
    return [
        Legal(f'{key} ({type(metric).__name__})', len(metric.dataset_meta['classes']), metric.ignore_index)
        for metric in metrics
        if (metric.dataset_meta or {}).get('classes') and not getattr(metric, 'format_only', False)
    ]


def check_label_maps(samples: Iterable, accepted: Iterable[Legal]) -> None:
    """Compare the values of label maps with those that heads or metrics accept.

    Raises:
        DataError: naming the file, the value, and the head or metric.
    """
    for sample in samples:
        for legal in accepted:
            value = legal.first_wrong(sample.gt_sem_seg.data)
            if value is not None:
                shifted = sample.get('reduce_zero_label', False)
                raw = value + 1 if shifted and value != IGNORED else value
                raise wrong_value(sample.get('seg_map_path') or sample.get('img_path'), raw, value, legal)


def _will_be_padded(preprocessor: nn.Module, shapes: Sequence[tuple[int, int]]) -> bool:
    size, divisor = getattr(preprocessor, 'size', None), getattr(preprocessor, 'size_divisor', None) or 1
    if size is not None:
        return any(h < size[-2] or w < size[-1] for h, w in shapes)
    return len(set(shapes)) > 1 or any(side % divisor for side in shapes[0])
