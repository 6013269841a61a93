"""The plain vision transformer: the network and its weights."""

from mmvim.models.backbones.vit.model import VisionTransformer

__all__ = ['VisionTransformer']
