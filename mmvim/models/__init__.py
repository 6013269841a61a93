"""Backbones, necks and layers; needs torch, mmengine and mmcv, but no host library."""

from mmvim.models import backbones, layers, necks

__all__ = ['backbones', 'layers', 'necks']
