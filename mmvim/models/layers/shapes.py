"""Questions about shapes that an export with free sizes must not settle."""

from torch.fx.experimental.symbolic_shapes import statically_known_true


def surely_equal(a: tuple[int, ...], b: tuple[int, ...]) -> bool:
    """Whether two shapes are equal; False where an export leaves it open, so that the general way is taken there."""
    return all(statically_known_true(m == n) for m, n in zip(a, b, strict=True))
