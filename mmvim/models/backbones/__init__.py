"""Backbones: a folder each, with the network in `model.py`, and how weights are read and fitted in `weights.py`."""

from mmvim.models.backbones.hier_vim import HierVim
from mmvim.models.backbones.mambavision import MambaVision
from mmvim.models.backbones.vim import VisionMamba
from mmvim.models.backbones.vit import VisionTransformer

__all__ = ['HierVim', 'MambaVision', 'VisionMamba', 'VisionTransformer']
