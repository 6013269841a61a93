"""Vim: the network and its weights."""

from mmvim.models.backbones.vim.model import VisionMamba

__all__ = ['VisionMamba']
