"""One look through the images and label maps of a data loader before a run begins."""

import logging
import time
from collections import Counter
from collections.abc import Sequence
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor

from mmvim.datasets.image_files import Header, in_time
from mmvim.datasets.pipelines import plain_datasets
from mmvim.datasets.segmentation import (
    TRANSPOSED,
    Pair,
    Values,
    check_existence,
    check_folder,
    check_pair,
    label_map_datasets,
    labels_stay,
    pairs_of,
    values_of,
)
from mmvim.errors import DataError

HEADER_SECONDS, VALUE_SECONDS = 30.0, 10.0  # at most, for each data loader
IN_ORDER = 1000  # more are taken in random order, as time may not suffice for all


class Legal(NamedTuple):
    """The values in a label map that a head or a metric accepts: 0 to num_classes - 1, and ignore_index."""

    owner: str
    num_classes: int
    ignore_index: int | None

    def first_wrong(self, labels: Tensor) -> int | None:
        """A value of a label map that is not legal; None if there is none."""
        if not labels.numel():
            return None
        lowest, highest = labels.aminmax()
        if 0 <= lowest and highest < self.num_classes:
            return None
        wrong = (labels < 0) | (labels >= self.num_classes)
        if self.ignore_index is not None:
            wrong &= labels != self.ignore_index
        return int(labels[wrong][0]) if wrong.any() else None

    def counts(self, labels: Tensor, pixels: Tensor | None = None) -> Tensor:
        """Pixels of each class in legal labels, of which each stands for one pixel or as many as given."""
        classes = labels < self.num_classes
        if self.ignore_index is not None:
            classes &= labels != self.ignore_index
        weights = None if pixels is None else pixels[classes].double()
        return torch.bincount(labels[classes], weights, self.num_classes).long()

    def __str__(self) -> str:
        """For messages, such as 'model.decode_head has num_classes=3 and ignore_index=255'."""
        return f'{self.owner} has num_classes={self.num_classes} and ignore_index={self.ignore_index}'


def wrong_value(path: str, raw: int, value: int, legal: Legal) -> DataError:
    """What to say of a label map with a value, ``raw`` in the file, that is not legal."""
    step = 'reduce_zero_label' if raw in (value + 1, 0) else 'the classes were renumbered'
    shifted = f' ({value} after {step})' if raw != value else ''
    lossy = '; JPEG changes values, so save label maps as PNG' if path.lower().endswith(('.jpg', '.jpeg')) else ''
    return DataError(
        f"label map '{path}' has the value {raw}{shifted}, but {legal}: set num_classes to the number of classes, "
        'ignore_index of heads, data set and evaluator to the value of unlabelled pixels, or reduce_zero_label=True if '
        f'0 is the background and not a class{lossy}'
    )


def scan(dataset: Any, loader: str, accepted: Sequence[Legal], logger: logging.Logger) -> None:
    """Look through the images and label maps of a data set, and say what a run could not learn or measure.

    All files must be there. Headers are read for as many pairs as `HEADER_SECONDS` allow and values for as many as
    `VALUE_SECONDS` do; the log says for how many. Files of remote storage, and data sets with loaders of their own, are
    not looked at.

    Args:
        dataset: the data set, which may join others.
        loader: name of its data loader, for messages.
        accepted: what heads or metrics accept.
        logger: where warnings go.

    Raises:
        DataError: for files that cannot be used, and if training data has no labelled pixel.
    """
    parts = label_map_datasets(dataset)
    others = sum(hasattr(part, 'seg_map_suffix') for part in plain_datasets(dataset)) - len(parts)
    if others:
        logger.info(f'{loader}: {others} data sets are not looked through before the run')
    if not parts:
        return
    start = time.monotonic()
    for part in parts:
        twice = [name for name, count in Counter(part.metainfo.get('classes') or ()).items() if count > 1]
        if twice:
            raise DataError(
                f'{loader}: classes names {twice[0]!r} twice: give each class once, in the order of the values'
            )
        warning = check_folder(part)
        if warning:
            logger.warning(f'{loader}: {warning}')
    pairs = [pair for part in parts for pair in pairs_of(part)]
    check_existence(pairs, loader)
    if len(pairs) > IN_ORDER:
        pairs = [pairs[i] for i in np.random.default_rng(0).permutation(len(pairs))]
    headers = in_time(check_pair, pairs, HEADER_SECONDS)
    _warn_of_forms(headers, loader, logger)
    values = in_time(values_of, pairs, VALUE_SECONDS) if accepted and all(map(labels_stay, parts)) else []
    if values:
        _check_values(values, accepted)
        _check_classes(values, len(pairs), accepted[0], dataset, loader, logger)
    logger.info(
        f'{loader}: {len(pairs)} label maps are there; sizes of {len(headers)} and values of {len(values)} checked in '
        f'{time.monotonic() - start:.1f} s'
    )


def _warn_of_forms(headers: Sequence[tuple[Pair, Header, Header]], loader: str, logger: logging.Logger) -> None:
    lossy = [pair.label_map for pair, _, labels in headers if labels.format == 'JPEG']
    if lossy:
        logger.warning(
            f"{loader}: {len(lossy)} label maps are JPEG files, whose compression changes values ('{lossy[0]}'): save "
            'label maps as PNG'
        )
    turned = Counter(
        image.orientation
        for _, image, labels in headers
        if image.orientation in range(2, 9) and (image.orientation not in TRANSPOSED or len(set(labels.size)) == 1)
    )
    if turned:
        logger.warning(
            f'{loader}: {sum(turned.values())} images have an EXIF orientation ({min(turned)}) that leaves their size: '
            'make sure that their label maps were drawn on the images as viewers show them, since images are turned on '
            'loading and label maps are not'
        )


def _check_values(values: Sequence[Values], accepted: Sequence[Legal]) -> None:
    for entry in values:
        labels = torch.from_numpy(entry.labels.astype(np.int64))
        for legal in accepted:
            value = legal.first_wrong(labels)
            if value is not None:
                raise wrong_value(entry.path, int(entry.raw[entry.labels == value][0]), value, legal)


def _check_classes(
    values: Sequence[Values], total: int, legal: Legal, dataset: Any, loader: str, logger: logging.Logger
) -> None:
    raw: Counter[int] = Counter()
    pixels = torch.zeros(legal.num_classes, dtype=torch.int64)
    for entry in values:
        raw.update(dict(zip(entry.raw.tolist(), entry.pixels.tolist(), strict=True)))
        labels = torch.from_numpy(entry.labels.astype(np.int64))
        pixels += legal.counts(labels, torch.from_numpy(entry.pixels))
    names = (getattr(dataset, 'metainfo', None) or {}).get('classes') or range(legal.num_classes)
    absent = [str(name) for name, count in zip(names, pixels, strict=False) if not count]
    if not absent:
        return
    read = f'the {total} label maps' if len(values) == total else f'the {len(values)} label maps read (of {total})'
    found = ', '.join(f'{value} ({count / raw.total():.1%})' for value, count in raw.most_common(8))
    training = loader == 'train_dataloader'
    remedy = f'labels are 0 to {legal.num_classes - 1}, {legal.ignore_index} is ignored'
    if (getattr(dataset, 'metainfo', None) or {}).get('reduce_zero_label'):
        remedy = f'labels are 1 to {legal.num_classes}, 0 and {legal.ignore_index} are ignored (reduce_zero_label)'
    if len(absent) == legal.num_classes:
        message = f'every pixel of {read} of {loader} is ignored; values in the files: {found}; {remedy}'
        if training and len(values) == total:
            raise DataError(f'nothing can be learnt: {message}')
        logger.warning(f'{message}: {"nothing can be learnt" if training else "the metrics will mean nothing"}')
        return
    effect = 'cannot be learnt' if training else 'will be missing from the metrics'
    if training and len(absent) == legal.num_classes - 1 > 0:
        effect = 'cannot be learnt, and the model will answer the only other one everywhere'
    if len(values) < total:
        effect = effect.replace('cannot be', 'may not be').replace('will', 'may')
    logger.warning(
        f'{loader}: {len(absent)} of {legal.num_classes} classes {effect}, as {read} have no pixel of them: '
        f'{", ".join(absent[:10])}{", ..." if absent[10:] else ""}; values in the files: {found}; {remedy}'
    )
