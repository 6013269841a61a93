"""Backbones."""

from mmvim.models.backbones.hier_vim import HierVim
from mmvim.models.backbones.mambavision import MambaVision
from mmvim.models.backbones.vision_mamba import VisionMamba
from mmvim.models.backbones.vision_transformer import VisionTransformer

__all__ = ['HierVim', 'MambaVision', 'VisionMamba', 'VisionTransformer']
