"""Checks of label maps while a run reads them."""

from collections.abc import Iterable, Sequence
from functools import partialmethod
from typing import NamedTuple

from mmengine.hooks import Hook
from mmengine.runner import Runner
from torch import Tensor, nn

from mmvim.engine.hooks import head_class_counts, unwrapped
from mmvim.errors import ConfigError, DataError
from mmvim.registry import HOOKS


class Legal(NamedTuple):
    """The values in a label map that a head or a metric accepts: 0 to num_classes - 1, and ignore_index."""

    owner: str
    num_classes: int
    ignore_index: int | None

    def first_wrong(self, labels: Tensor) -> int | None:
        """A value of a label map that is not legal; None if there is none."""
        lowest, highest = labels.aminmax()
        if 0 <= lowest and highest < self.num_classes:
            return None
        wrong = labels[((labels < 0) | (labels >= self.num_classes)) & (labels != self.ignore_index)]
        return wrong[0].item() if wrong.numel() else None

    def __str__(self) -> str:
        """For messages, such as 'model.decode_head has num_classes=3 and ignore_index=255'."""
        return f'{self.owner} has num_classes={self.num_classes} and ignore_index={self.ignore_index}'


@HOOKS.register_module()
class LabelMapHook(Hook):
    """Refuse label maps with values that are neither a class nor the one to ignore.

    In training the loss would index beyond its classes, which on a GPU ends the whole process. In validation and tests
    the host's metric would drop such pixels from the ground truth and yet count what is predicted there.
    """

    def before_train(self, runner: Runner) -> None:
        """Note which values the heads of the model accept."""
        model = unwrapped(runner.model)
        self.preprocessor = getattr(model, 'data_preprocessor', None)
        heads: dict[tuple, Legal] = {}  # one of those that accept the same, as the maps are read for each
        for name, count in head_class_counts(model):
            head = model.get_submodule(name)
            if hasattr(head, 'ignore_index'):
                heads.setdefault((count, head.ignore_index), Legal(f'model.{name}', count, head.ignore_index))
        self.heads = list(heads.values())

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

    def check_metrics(self, runner: Runner, batch_idx: int, data_batch: dict | None = None, *, key: str) -> None:
        """Check the label maps of a batch against the metrics of the evaluator of this name."""
        check_label_maps(labelled(data_batch), metrics_of(getattr(runner, key), key))

    before_val_iter = partialmethod(check_metrics, key='val_evaluator')
    before_test_iter = partialmethod(check_metrics, key='test_evaluator')


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
                raise DataError(
                    f"label map '{sample.get('seg_map_path') or sample.get('img_path')}' has the value "
                    f'{value + shifted}{f" ({value} after reduce_zero_label)" if shifted else ""}, but {legal}: set '
                    'num_classes to the number of classes, ignore_index of heads, data set and evaluator to the value '
                    'of unlabelled pixels, or reduce_zero_label=True if 0 is the background and not a class'
                )


def _will_be_padded(preprocessor: nn.Module, shapes: Sequence[tuple[int, int]]) -> bool:
    size, divisor = getattr(preprocessor, 'size', None), getattr(preprocessor, 'size_divisor', None) or 1
    if size is not None:
        return any(h < size[-2] or w < size[-1] for h, w in shapes)
    return len(set(shapes)) > 1 or any(side % divisor for side in shapes[0])
