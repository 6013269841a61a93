"""A data set's pipeline whose errors name the sample."""

from collections.abc import Iterator, Sequence
from typing import Any

from mmengine.dataset import Compose

from mmvim.errors import DataError, InputError, first_line

PASSED_ON = (InputError, MemoryError)


class NamedSamples(Compose):
    """A pipeline that names the image in every error, and refuses a label map of another size than its image.

    An error of a data loader's worker arrives as text, so this is the last point that knows the sample.

    Args:
        pipeline: the one to take the transforms of.
        any_size: whether a label map may be smaller or larger than its image, with the same ratio of sides.
    """

    def __init__(self, pipeline: Compose, any_size: bool = False) -> None:
        self.transforms = pipeline.transforms
        self.any_size = any_size

    def __call__(self, data: dict) -> dict | None:
        """Apply the transforms.

        Raises:
            DataError: naming the file and the transform.
        """
        for transform in self.transforms:
            had_labels = 'gt_seg_map' in data
            try:
                result = transform(data)
            except PASSED_ON:
                raise
            except Exception as error:
                raise DataError(_describe(data, transform, error)) from error
            if result is None:
                return None
            data = result
            if isinstance(data, dict) and not had_labels:
                check_sizes(data, self.any_size)
        return data


def _describe(data: Any, transform: Any, error: Exception) -> str:
    named = [
        f"{what} '{data[key]}'"
        for what, key in (('image', 'img_path'), ('label map', 'seg_map_path'))
        if isinstance(data, dict) and data.get(key)
    ]
    step = type(transform).__name__
    reason = ' '.join(f'{type(error).__name__}: {error}'.split())[:300] if str(error) else first_line(error)
    remedy = 'replace the file' if step.startswith('LoadImage') else 'check this file and the settings of the transform'
    return f'{" with ".join(named) or "a sample"} fails in {step} ({reason}): {remedy}; MMVIM_TRACEBACK=1 shows where'


def check_sizes(sample: dict, any_size: bool = False) -> None:
    """Refuse a sample whose label map, just loaded, has another size than the image had.

    Args:
        sample: what the pipeline passes on.
        any_size: accept another size with the same ratio of sides.

    Raises:
        DataError: naming both files.
    """
    labels, size = sample.get('gt_seg_map'), sample.get('ori_shape')
    if labels is None or size is None or tuple(labels.shape[:2]) == tuple(size[:2]):
        return
    if not (any_size and same_aspect(labels.shape, size)):
        raise DataError(other_size(sample['img_path'], size, sample['seg_map_path'], labels.shape))


def other_size(image: str, image_size: tuple[int, ...], label_map: str, label_size: tuple[int, ...]) -> str:
    """What to say of an image and a label map of these sizes (height, width)."""
    turned = tuple(image_size[:2]) == tuple(label_size[1::-1])
    cause = (
        'the image has an EXIF rotation, which is applied on loading, and the label map was drawn without it, or the '
        'reverse: save the image without EXIF rotation, or turn the label map'
        if turned
        else 'they must have the same size: draw the label map on this image, or rescale it without interpolation'
    )
    return (
        f"image '{image}' has {image_size[0]} rows and {image_size[1]} columns, its label map '{label_map}' "
        f'{label_size[0]} and {label_size[1]}: {cause}'
    )


def same_aspect(first: Sequence[int], second: Sequence[int]) -> bool:
    """Whether two sizes have the same ratio of sides, but for rounding."""
    return abs(first[0] * second[1] - first[1] * second[0]) <= max(*first[:2], *second[:2])


def plain_datasets(dataset: Any) -> Iterator[Any]:
    """The data sets in those that only join, repeat or mix others."""
    inner = getattr(dataset, 'datasets', None) or ([dataset.dataset] if hasattr(dataset, 'dataset') else [])
    if not inner:
        yield dataset
    for part in inner:
        yield from plain_datasets(part)


def name_samples(dataset: Any) -> None:
    """Let the pipelines of a data set, and of those in it, name the sample in their errors."""
    for part in plain_datasets(dataset):
        pipeline = getattr(part, 'pipeline', None)
        if type(pipeline) is Compose:
            part.pipeline = NamedSamples(pipeline, any_size=resizes_to_one_size(pipeline.transforms))


def resizes_to_one_size(transforms: list) -> bool:
    """Whether the first transform after loading brings image and label map to one size, whatever theirs."""
    steps = [step for step in transforms if not type(step).__name__.startswith('Load')]
    first = steps[0] if steps else None
    return type(first).__name__ == 'Resize' and getattr(first, 'scale', None) is not None and not first.keep_ratio
