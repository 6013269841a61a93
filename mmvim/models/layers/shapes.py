"""Questions about shapes that an export with free sizes must not settle."""

import torch
from torch.fx.experimental.symbolic_shapes import statically_known_true


def surely(condition: bool | torch.SymBool | torch.Tensor) -> bool:
    """Whether a condition on sizes holds; False where an export leaves it open."""
    # torch.jit.trace, which knows no free sizes, has tensors for them
    return bool(condition) if isinstance(condition, torch.Tensor) else statically_known_true(condition)


def surely_equal(a: tuple[int, ...], b: tuple[int, ...]) -> bool:
    """Whether two shapes are equal; False where an export leaves it open, so that the general way is taken there."""
    return all(surely(m == n) for m, n in zip(a, b, strict=True))
