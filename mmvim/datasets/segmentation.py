"""Looking through the images and label maps of a segmentation data set before a run uses them."""

import os
from collections.abc import Iterable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import Any, NamedTuple

import numpy as np

from mmvim.compat.label_maps import decode_label_map, relabel
from mmvim.datasets.image_files import IMAGES, THREADS, Header, check_depth, decode, problem, read_header
from mmvim.datasets.pipelines import other_size, plain_datasets, resizes_to_one_size, same_aspect
from mmvim.errors import DataError

TRANSPOSED = range(5, 9)  # orientations that swap width and height
HOSTS = ('mmcv', 'mmseg', 'mmvim', 'mmengine')


class Pair(NamedTuple):
    """An image and its label map.

    Attributes:
        image: file of the image.
        label_map: file of the label map.
        decoder: ``flag`` and ``backend`` by which the pipeline decodes the image; None if it has a loader of its own.
        label_decoder: backend by which it decodes the label map.
        any_size: whether the pipeline brings both to one size first.
        reduce_zero_label: as in MMSegmentation.
        renumbering: label_map of MMSegmentation, new classes by old.
        loader: transform that loads the image.
    """

    image: str
    label_map: str
    decoder: tuple[str, str] | None
    label_decoder: str
    any_size: bool
    reduce_zero_label: bool
    renumbering: dict | None
    loader: Any = None


class Values(NamedTuple):
    """The values in a label map as the file has them, what the pipeline makes of them, and the pixels of each."""

    path: str
    raw: np.ndarray
    labels: np.ndarray
    pixels: np.ndarray


def steps_of(transforms: Iterable[Any]) -> Iterator[Any]:
    """Transforms, also those in a test-time augmentation."""
    for step in transforms:
        subroutines = getattr(step, 'subroutines', None)
        for part in [step] if subroutines is None else subroutines:
            yield from [step] if subroutines is None else steps_of(part.transforms)


def label_map_datasets(dataset: Any) -> list:
    """Those parts of a data set that load label maps of local files by MMSegmentation's LoadAnnotations."""
    return [
        part
        for part in plain_datasets(dataset)
        if hasattr(part, 'seg_map_suffix') and _step(part, 'LoadAnnotations') and _is_local(part.backend_args)
    ]


def _is_local(backend_args: dict | None) -> bool:
    return (backend_args or {}).get('backend', 'local') in ('local', 'disk')


def _step(dataset: Any, name: str) -> Any:
    transforms = getattr(getattr(dataset, 'pipeline', None), 'transforms', ())
    return next((step for step in steps_of(transforms) if type(step).__name__ == name), None)


def labels_stay(dataset: Any) -> bool:
    """Whether only transforms of the hosts are in the pipeline, which leave the values of labels as they are loaded."""
    return all(type(step).__module__.split('.')[0] in HOSTS for step in steps_of(dataset.pipeline.transforms))


def pairs_of(dataset: Any) -> list[Pair]:
    """All images of a data set with their label maps."""
    loader, labels = _step(dataset, 'LoadImageFromFile'), _step(dataset, 'LoadAnnotations')
    samples = [dataset.get_data_info(i) for i in range(len(dataset))]
    return [
        Pair(
            sample['img_path'],
            sample['seg_map_path'],
            loader and (loader.color_type, loader.imdecode_backend),
            labels.imdecode_backend,
            resizes_to_one_size(dataset.pipeline.transforms),
            bool(sample.get('reduce_zero_label')),
            sample.get('label_map'),
            loader,
        )
        for sample in samples
        if sample.get('seg_map_path') and '://' not in sample['img_path']
    ]


def check_existence(pairs: Sequence[Pair], loader: str) -> None:
    """Refuse images and label maps that are missing, empty or no files.

    Raises:
        DataError: with their number and the first.
    """
    for what in ('label_map', 'image'):
        paths = [getattr(pair, what) for pair in pairs]
        with ThreadPoolExecutor(THREADS) as pool:
            problems = list(pool.map(lambda path: problem(path, hint=False), paths))
        bad = [(path, reason) for path, reason in zip(paths, problems, strict=True) if reason]
        if bad:
            path = bad[0][0]
            reason = problem(path)  # only one hint, for which a folder is listed
            name = what.replace('_', ' ')
            count = f'{len(bad)} of {len(paths)} {name}s of {loader} cannot be used, the first: ' if bad[1:] else ''
            remedy = (
                f'add it, take its {"image" if what == "label_map" else "name"} out of the data set, or correct '
                'data_root, the folders and the suffixes (img_suffix, seg_map_suffix)'
            )
            raise DataError(f"{count}{name} '{path}' {reason}: {remedy}")


def check_folder(dataset: Any) -> str | None:
    """Refuse an image folder with files that the data set passes over though they belong to it.

    Returns:
        A warning about label maps without an image and images with another suffix; None if there are none.

    Raises:
        DataError: for suffixes that differ in case only, and for links and other entries that are no files.
    """
    folder, suffix = dataset.data_prefix.get('img_path') or '', dataset.img_suffix
    if (dataset.ann_file and os.path.isfile(dataset.ann_file)) or not os.path.isdir(folder):
        return None
    names = _files(folder)
    for name in names:
        if name.endswith(suffix) and not os.path.isfile(os.path.join(folder, name)):
            raise DataError(f"image '{os.path.join(folder, name)}' {problem(os.path.join(folder, name))}: remove it")
    cased = [name for name in names if name.lower().endswith(suffix.lower()) and not name.endswith(suffix)]
    if cased:
        raise DataError(
            f"{len(cased)} files of image folder '{folder}' would be left out, the first is '{cased[0]}': their suffix "
            f'differs from img_suffix={suffix!r} in case; rename them'
        )
    return _left_out(dataset, folder, names)


def _left_out(dataset: Any, folder: str, names: list[str]) -> str | None:
    suffix, label_suffix = dataset.img_suffix, dataset.seg_map_suffix
    other = [n for n in names if n.lower().endswith(IMAGES) and not n.endswith((suffix, label_suffix))]
    if other:
        return f"{len(other)} images of '{folder}' do not end in img_suffix={suffix!r} and are left out: '{other[0]}'"
    label_folder = dataset.data_prefix.get('seg_map_path')
    if not label_folder or not os.path.isdir(label_folder):
        return None
    stems = {name[: -len(suffix)] for name in names if name.endswith(suffix)}
    labels = [name for name in _files(label_folder) if name.endswith(label_suffix)]
    alone = [name for name in labels if name[: -len(label_suffix)] not in stems]
    if alone and os.path.abspath(label_folder) != os.path.abspath(folder):
        return f"{len(alone)} of {len(labels)} label maps of '{label_folder}' have no image in '{folder}': '{alone[0]}'"
    return None


def _files(folder: str) -> list[str]:
    """Everything but folders and hidden files below a folder, as MMSegmentation searches it."""
    return sorted(
        os.path.relpath(os.path.join(parent, name), folder)
        for parent, _, names in os.walk(folder)
        for name in names
        if not name.startswith('.')
    )


def check_pair(pair: Pair) -> tuple[Pair, Header, Header]:
    """Refuse an image and label map that are unreadable, truncated, of different size, or of the wrong form.

    Raises:
        DataError: naming the files.
    """
    image = _image_header(pair)
    check_depth(pair.image, image, pair.loader)
    labels = _label_header(pair)
    size = image.size[::-1] if image.orientation in TRANSPOSED and _oriented(pair) else image.size
    if size != labels.size and pair.decoder:  # the decoder of the pipeline has the last word
        size = _decode(pair).shape[:2]
    if pair.decoder and size != labels.size and not (pair.any_size and same_aspect(size, labels.size)):
        raise DataError(other_size(pair.image, size, pair.label_map, labels.size))
    return pair, image, labels


def _oriented(pair: Pair) -> bool:
    return bool(pair.decoder) and pair.decoder[0] in ('color', 'grayscale')


def _image_header(pair: Pair) -> Header:
    header = read_header('image', pair.image)
    return header or Header(_decode(pair).shape[:2] if pair.decoder else (0, 0))


def _label_header(pair: Pair) -> Header:
    header = read_header('label map', pair.label_map)
    if header and (header.mode in ('1', 'L') or (header.mode == 'P' and pair.label_decoder == 'pillow')):
        return header
    return (header or Header((0, 0)))._replace(size=_labels(pair).shape)


def _decode(pair: Pair) -> np.ndarray:
    assert pair.decoder is not None
    return decode(pair.image, *pair.decoder)


def _labels(pair: Pair) -> np.ndarray:
    with open(pair.label_map, 'rb') as file:
        return decode_label_map(file.read(), pair.label_map, pair.label_decoder)


def values_of(pair: Pair) -> Values:
    """The values of a label map."""
    labels = _labels(pair)
    counts = np.bincount(labels.ravel())
    raw = np.flatnonzero(counts)
    relabelled = relabel(raw.astype(labels.dtype), pair.label_map, pair.reduce_zero_label, pair.renumbering)
    return Values(pair.label_map, raw, relabelled, counts[raw])
