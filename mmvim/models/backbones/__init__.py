"""Backbones."""

from mmvim.models.backbones.hier_vim import HierVim
from mmvim.models.backbones.mambavision import MambaVision
from mmvim.models.backbones.vision_mamba import VisionMamba

__all__ = ['HierVim', 'MambaVision', 'VisionMamba']
