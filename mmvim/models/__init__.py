"""Backbones, necks and layers; needs torch, mmengine and mmcv, but no host library."""

from mmvim.models.backbones import HierVim, MambaVision, VisionMamba, VisionTransformer
from mmvim.models.layers import LayerNorm2d
from mmvim.models.necks import SimpleFPN

__all__ = ['HierVim', 'LayerNorm2d', 'MambaVision', 'SimpleFPN', 'VisionMamba', 'VisionTransformer']
