"""Which model a file's weights belong to, and the backbone that takes them."""

from collections.abc import Mapping

from torch import Tensor

from mmvim.models.backbones import HierVim, MambaVision, VisionMamba, VisionTransformer
from mmvim.models.backbones.vim.weights import LONG_SEQUENCE
from mmvim.weights.family import Identity

__all__ = ['LONG_SEQUENCE', 'Identity', 'identify']


def identify(weights: Mapping[str, Tensor]) -> Identity | None:
    """Recognise the weights of a backbone or of a published classifier; None if they are of another model.

    Args:
        weights: by the names that the backbone or its published files give them, without `backbone.`.

    Raises:
        CheckpointError: if the position table of a Vim or DeiT fits no grid.
    """
    found = (
        cls.WEIGHTS.recognise(weights, cls.arch_zoo) for cls in (VisionMamba, MambaVision, HierVim, VisionTransformer)
    )
    return next((identity for identity in found if identity is not None), None)
