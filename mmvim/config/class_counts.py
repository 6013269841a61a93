"""The number of classes of the data, wherever a model config counts them."""

from mmvim.compat.types import kind_of
from mmvim.errors import ConfigError

# Parts with a num_classes that counts other things than the data's classes: modules, heads by name, and by class.
OTHER_PARTS = ('backbone', 'reid')
OTHER_HEADS = ('rpn_head', 'semantic_head')  # objects; things and stuff of MMDetection's HTC, SCNet and Panoptic FPN
OTHER_TYPES = ('STDCHead',)  # borders


def set_num_classes(model: dict, count: int) -> None:
    """Set the number of classes wherever a model config counts those of the data.

    That is ``num_classes`` of every part but backbones, those in `OTHER_HEADS` and `OTHER_TYPES`, which count other
    things, and losses. A loss follows the head it belongs to if it had the same number, and so does a
    ``class_weight`` with one weight per class (and one for the background) if all classes have the same. Of a panoptic
    head without stuff, which segments instances, it is ``num_things_classes``.

    Args:
        model: the model's config, changed in place.
        count: classes of the data, without background.

    Raises:
        ConfigError: if a head has stuff classes, which data with boxes and masks has not, or weights of its own for
            each class, whose number is another.
    """
    _set_num_classes(model, count, None, 'model')


def _set_num_classes(part: dict, count: int, before: int | None, path: str, is_loss: bool = False) -> None:
    """The same for a part below a head that had ``before`` classes."""
    if is_loss:
        if part.get('num_classes') == before is not None:
            part['num_classes'] = count
        _set_class_weight(part, count, before, path)
    elif 'num_stuff_classes' in part or 'num_things_classes' in part:
        stuff = part.get('num_stuff_classes')  # left out, it is the head's default, not 0
        if stuff != 0:
            raise ConfigError(
                f'{path}.num_stuff_classes={stuff}, but the data set has objects only: set it to 0 '
                'as in mask2former_r50_8xb2-lsj-50e_coco.py of MMDetection, or use a panoptic data set'
            )
        before, part['num_things_classes'] = part.get('num_things_classes'), count
    elif part.get('num_classes') is not None:
        before, part['num_classes'] = part['num_classes'], count
    for key, value in part.items():
        for i, child in enumerate(value) if isinstance(value, list | tuple) else ((None, value),):
            if (
                isinstance(child, dict)
                and key not in (*OTHER_PARTS, *OTHER_HEADS)
                and kind_of(child) not in OTHER_TYPES
            ):
                place = f'{path}.{key}' + ('' if i is None else f'.{i}')
                _set_num_classes(child, count, before, place, key.startswith('loss'))


def _set_class_weight(loss: dict, count: int, before: int | None, path: str) -> None:
    weights = loss.get('class_weight')
    if not isinstance(weights, list | tuple) or before in (None, count) or len(weights) - before not in (0, 1):
        return
    if len(set(weights[:before])) > 1:
        raise ConfigError(
            f'{path}.class_weight has a weight for each of {before} classes, but the data set has {count}: '
            'give one per class'
        )
    loss['class_weight'] = [weights[0]] * count + list(weights[before:])
