"""Backbones."""

from mmvim.models.backbones.vision_mamba import VisionMamba

__all__ = ['VisionMamba']
