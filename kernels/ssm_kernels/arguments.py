"""Checks that ops share: what tensors and options they take, and what autocast makes of tensors."""

from __future__ import annotations

import math
import sys
from typing import Any, NoReturn

import torch
from torch import Tensor

DTYPES = (torch.float32, torch.float16, torch.bfloat16, torch.float64)


def autocast_dtype(x: Tensor) -> torch.dtype | None:
    """What autocast makes of activations like x; None where it leaves them alone."""
    if x.is_meta or x.dtype == torch.float64 or not torch.is_autocast_enabled(x.device.type):
        return None
    return torch.get_autocast_dtype(x.device.type)


def fail(op: str, name: str, problem: str) -> NoReturn:
    """Raises the ValueError of an op about its argument of this name."""
    raise ValueError(f'{op}: {name} {problem}')


def shape_of(x: Tensor) -> str:
    """The shape as messages give it: (2, 7, 6)."""
    return str(tuple(x.shape))


def _is_dense(x: Tensor) -> bool:
    return x.layout is torch.strided and not x.is_nested


def check_tensor(op: str, name: str, x: Any) -> None:
    """Raises ValueError unless x is a dense tensor of a floating dtype that the ops know, with no size of zero."""
    if not isinstance(x, Tensor):
        fail(op, name, f'must be a tensor, got {type(x).__name__}')
    if not _is_dense(x):
        fail(op, name, f'is a {"nested" if x.is_nested else x.layout} tensor; it must be dense (torch.strided)')
    if x.dtype not in DTYPES:
        fail(op, name, f'has dtype {x.dtype}; legal are {", ".join(map(str, DTYPES))}')
    if 0 in x.shape:
        fail(op, name, f'has shape {shape_of(x)}; every size must be at least 1')


def check_beside(
    op: str,
    name: str,
    tensor: Any,
    x: Tensor,
    dtypes: tuple[torch.dtype, ...],
    x_name: str = 'x',
    optional: bool = False,
) -> None:
    """Raises ValueError unless tensor is dense, on the device of the op's input x and has one of the dtypes.

    Args:
        op: name of the op, for the message.
        name: of the argument.
        tensor: its value, whatever it is.
        x: the op's input, checked before.
        dtypes: that tensor may have.
        x_name: name of the input.
        optional: whether None will do as well.

    Raises:
        ValueError: that names the argument and says what is legal.
    """
    if tensor is None and optional:
        return
    if (
        isinstance(tensor, Tensor)
        and tensor.dtype in dtypes
        and tensor.device == x.device
        and _is_dense(tensor)
        and 0 not in tensor.shape
    ):
        return
    check_tensor(op, name, tensor)
    if tensor.device != x.device:
        fail(op, name, f'is on {tensor.device}, {x_name} is on {x.device}; all tensors must be on one device')
    legal = ' or '.join(map(str, dict.fromkeys(dtypes)))
    fail(op, name, f'has dtype {tensor.dtype}, {x_name} has {x.dtype}; {name} must be {legal}')


def check_shape(
    op: str, name: str, tensor: Tensor | None, wanted: tuple[int, ...], x: Tensor, x_name: str = 'x', free: str = ''
) -> None:
    """Raises ValueError unless tensor, where there is one, has the shape that follows from the op's input x.

    Args:
        op: name of the op, for the message.
        name: of the argument.
        tensor: its value, a tensor or None.
        wanted: the sizes.
        x: the op's input.
        x_name: its name.
        free: name of one more size at the end, which may be any.

    Raises:
        ValueError: with both shapes.
    """
    if tensor is None or (tensor.shape[:-1] if free else tensor.shape) == wanted:
        return
    legal = f'({", ".join(map(str, wanted))}, {free})' if free else tuple(wanted)
    fail(op, name, f'has shape {shape_of(tensor)}, must be {legal} for {x_name} of shape {shape_of(x)}')


def check_same_shape(op: str, name: str, tensor: Tensor | None, x: Tensor, x_name: str = 'x') -> None:
    """Raises ValueError unless tensor, where there is one, has the shape of the op's input x."""
    if tensor is not None and tensor.shape != x.shape:
        fail(op, name, f'has shape {shape_of(tensor)}, must equal that of {x_name}, {shape_of(x)}')


def check_flag(op: str, name: str, value: Any) -> None:
    """Raises ValueError unless value is True or False; 1 and numpy's True are neither."""
    if value is not True and value is not False:
        fail(op, name, f'must be True or False, got {value!r}')


def check_number(op: str, name: str, value: Any, least: float = -math.inf) -> None:
    """Raises ValueError unless value is a finite int or float, and at least ``least``."""
    if isinstance(value, bool) or not isinstance(value, (int, float)):
        fail(op, name, f'must be a number, got {value!r}')
    if not least <= value or not abs(value) <= sys.float_info.max:
        fail(op, name, f'is {value}, must be {"" if least == -math.inf else f"at least {least:g} and "}finite')


def check_choice(op: str, name: str, value: Any, choices: tuple[str | None, ...]) -> None:
    """Raises ValueError unless value is one of the choices."""
    if not (value is None or isinstance(value, str)) or value not in choices:
        fail(op, name, f'must be {" or ".join(map(repr, choices))}, got {value!r}')


def activation_dtypes(x: Tensor) -> tuple[torch.dtype, ...]:
    """What an op's other activations may be beside x: of its dtype; under autocast anything up to float32."""
    return (x.dtype,) if autocast_dtype(x) is None else DTYPES[:3]


def parameter_dtypes(x: Tensor) -> tuple[torch.dtype, ...]:
    """What an op's weights may be beside x: of its dtype or float32; under autocast anything up to float32."""
    if x.dtype == torch.float64:
        return (torch.float64,)
    if autocast_dtype(x) is not None:
        return DTYPES[:3]
    return x.dtype, torch.float32
