"""Hier-Vim: the network and its weights."""

from mmvim.models.backbones.hier_vim.model import HierVim

__all__ = ['HierVim']
