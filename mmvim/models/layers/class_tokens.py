"""Class tokens: their names, and where they stand among the patch tokens."""

import torch
from torch import Tensor

# B batch, M patch tokens, L tokens with class tokens, D width


def class_token_names(layout: str | None) -> tuple[str, ...]:
    """Parameters of the class tokens of a layout: 'middle', 'head', 'double' or None."""
    return {None: (), 'double': ('cls_token_head', 'cls_token_tail')}.get(layout, ('cls_token',))


def class_token_positions(layout: str | None, num_patches: int) -> tuple[int, ...]:
    """Where the class tokens stand in a sequence of num_patches patch tokens and the class tokens.

    Args:
        layout: 'middle', 'head', 'double' (one at each end) or None.
        num_patches: patch tokens in the sequence.
    """
    return {None: (), 'head': (0,), 'middle': (num_patches // 2,), 'double': (0, num_patches + 1)}[layout]


def insert_class_tokens(layout: str | None, patches: Tensor, tokens: list[Tensor]) -> Tensor:
    """Put class tokens (B, 1, D) where they belong among patch tokens (B, M, D)."""
    if not tokens:
        return patches
    if layout == 'double':
        return torch.cat((tokens[0], patches, tokens[1]), dim=1)
    (at,) = class_token_positions(layout, patches.shape[1])
    return torch.cat((patches[:, :at], tokens[0], patches[:, at:]), dim=1)


def class_tokens(layout: str | None, x: Tensor, num_patches: int) -> list[Tensor]:
    """The class tokens (B, 1, D) of a sequence (B, L, D) with num_patches patch tokens."""
    return [x[:, i : i + 1] for i in class_token_positions(layout, num_patches)]


def patch_tokens(layout: str | None, x: Tensor, num_patches: int) -> Tensor:
    """The patch tokens (B, M, D) of a sequence (B, L, D)."""
    if layout is None:
        return x
    first = class_token_positions(layout, num_patches)[0]
    if layout == 'middle':
        return torch.cat((x[:, :first], x[:, first + 1 :]), dim=1)
    return x[:, first + 1 : first + 1 + num_patches]
