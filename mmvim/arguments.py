"""Checks of arguments that several classes share; each ends in a ValueError that names the argument."""

import math
from collections.abc import Callable, Iterable, Mapping, Sequence
from functools import partial

from ssm_kernels.ops.causal_conv1d import MAX_WIDTH, MIN_WIDTH
from ssm_kernels.ops.mamba_inner import BACKENDS

INTERPOLATIONS = ('bicubic', 'bilinear', 'nearest', 'nearest-exact', 'area')


def check_choice(name: str, value: object, legal: Iterable) -> None:
    """Refuse what is none of the legal values."""
    legal = tuple(legal)
    if value not in legal:
        raise ValueError(f'{name} must be one of {legal}, got {value!r}')


def check_numbers(lowest: int = 1, **arguments: object) -> None:
    """Refuse arguments that are no whole numbers of at least ``lowest``."""
    for name, value in arguments.items():
        if not _is_number(value, lowest):
            raise ValueError(f'{name} must be a whole number of at least {lowest}, got {value!r}')


def check_flags(**arguments: object) -> None:
    """Refuse arguments that are neither True nor False; the word 'no' would count as True."""
    for name, value in arguments.items():
        if not isinstance(value, bool):
            raise ValueError(f'{name} must be True or False, got {value!r}')


def check_rates(**arguments: object) -> None:
    """Refuse probabilities of dropping that are not in [0, 1)."""
    for name, value in arguments.items():
        if isinstance(value, bool) or not isinstance(value, int | float) or not 0 <= value < 1:
            raise ValueError(f'{name} must be in [0, 1), got {value!r}')


def check_positive(**arguments: object) -> None:
    """Refuse arguments that are no finite numbers above 0."""
    for name, value in arguments.items():
        if isinstance(value, bool) or not isinstance(value, int | float) or not 0 < value < math.inf:
            raise ValueError(f'{name} must be a number above 0, got {value!r}')


def check_divide_output(divide_output: object, directions: str) -> None:
    """Refuse what is neither True nor False, and to leave out a division that there is not."""
    check_flags(divide_output=divide_output)
    if not divide_output and directions != 'v2':
        raise ValueError(
            f"divide_output=False is for directions='v2': {directions!r} divides nothing, leave divide_output out"
        )


def check_init_cfg(init_cfg: object) -> None:
    """Refuse what is no config of an initialisation, nor several."""
    cfgs = init_cfg if isinstance(init_cfg, list) else [init_cfg]
    if init_cfg is not None and not all(isinstance(cfg, dict) for cfg in cfgs):
        raise ValueError(f'init_cfg must be None, a dict or a list of dicts, got {init_cfg!r}')


def check_frozen_stages(value: object, highest: int) -> None:
    """Refuse what is no whole number from -1 to ``highest``."""
    if not _is_number(value, -1) or value > highest:
        raise ValueError(f'frozen_stages must be in -1 to {highest}, got {value!r}')


def check_backend(scan_backend: object) -> None:
    """Refuse a name that no backend of ssm_kernels has."""
    names = tuple(backend.name for backend in BACKENDS)
    if scan_backend is not None and scan_backend not in names:
        raise ValueError(f'scan_backend must be None or one of {names}, got {scan_backend!r}')


def as_indices(name: str, value: object) -> tuple[int, ...]:
    """One whole number, or several, as a tuple."""
    given = (value,) if isinstance(value, int) else value
    if isinstance(given, str) or not isinstance(given, Iterable):
        raise ValueError(f'{name} must be a whole number or several, got {value!r}')
    given = tuple(given)
    if not all(_is_number(index, -(2**31)) for index in given):
        raise ValueError(f'{name} must be a whole number or several, got {value!r}')
    return given


def four_numbers(name: str, value: object, part: str) -> tuple[int, ...]:
    """Four whole numbers of at least 1, one for each part of a hierarchical backbone, as a tuple."""
    numbers = tuple(value) if isinstance(value, Sequence) else ()
    if len(numbers) != 4 or not all(_is_number(number) for number in numbers):
        raise ValueError(f'{name} must be four whole numbers of at least 1, one per {part}, got {value!r}')
    return numbers


def check_arch(arch: Mapping) -> None:
    """Refuse sizes of an ``arch`` that no layer can have."""
    for name in ('embed_dims', 'stem_channels', 'd_state', 'expand', 'dt_rank'):
        if name in arch and not (name == 'dt_rank' and arch[name] is None):
            check_numbers(**{f'{name} of arch': arch[name]})
    if 'd_conv' in arch and not (_is_number(arch['d_conv'], MIN_WIDTH) and arch['d_conv'] <= MAX_WIDTH):
        raise ValueError(f'd_conv of arch must be {MIN_WIDTH} to {MAX_WIDTH}, got {arch["d_conv"]!r}')
    ratio = arch.get('mlp_ratio', 4)
    if isinstance(ratio, bool) or not isinstance(ratio, int | float) or arch['embed_dims'] * ratio < 1:
        raise ValueError(f'mlp_ratio of arch must be a number that gives the MLP a width of at least 1, got {ratio!r}')
    scale = arch.get('layer_scale')
    if scale is not None and (isinstance(scale, bool) or not isinstance(scale, int | float)):
        raise ValueError(f'layer_scale of arch must be a number or None, got {scale!r}')


def image_sides(img_size: object) -> tuple[int, int]:
    """Height and width in pixels of ``img_size``, one whole number or two."""
    if img_size is None:
        raise ValueError(
            "img_size is None, as in configs for a folder of one's own data, where mmvim's tools take it from "
            'image_size: elsewhere use the config that training saved in its work directory, or set '
            'model.backbone.img_size'
        )
    sides = tuple(img_size) if isinstance(img_size, Sequence) else (img_size, img_size)
    if len(sides) != 2 or not all(_is_number(side) for side in sides):
        raise ValueError(f'img_size must be a whole number of at least 1, or height and width, got {img_size!r}')
    return sides


def _is_number(value: object, lowest: int = 1) -> bool:
    return isinstance(value, int) and not isinstance(value, bool) and value >= lowest


# what an argument of this name must be in every backbone that has it
RULES: dict[str, Callable] = {
    **dict.fromkeys(('in_channels', 'patch_size', 'patch_stride'), check_numbers),
    **dict.fromkeys(
        ('final_norm', 'fit_windows', 'mixer_symmetric', 'norm_eval', 'with_cls_token', 'with_cp'), check_flags
    ),
    **dict.fromkeys(('drop_rate', 'drop_path_rate'), check_rates),
    **dict.fromkeys(('norm_eps', 'layer_scale_init', 'rotary_pretrain_size'), check_positive),
    'window_size': partial(check_numbers, 0),
    'interpolate_mode': lambda interpolate_mode: check_choice('interpolate_mode', interpolate_mode, INTERPOLATIONS),
    'scan_backend': check_backend,
    'init_cfg': check_init_cfg,
}
MAY_BE_NONE = {'final_norm', 'layer_scale_init', 'patch_stride', 'rotary_pretrain_size'}


def check_arguments(arguments: Mapping[str, object], choices: Mapping[str, Iterable]) -> None:
    """Refuse the first argument of a backbone that has no legal value.

    Args:
        arguments: all arguments by name; those with neither choices nor an entry in ``RULES`` are not checked.
        choices: legal values of the arguments that have few.
    """
    for name, value in arguments.items():
        if name in choices:
            check_choice(name, value, choices[name])
        elif name in RULES and not (value is None and name in MAY_BE_NONE):
            RULES[name](**{name: value})
