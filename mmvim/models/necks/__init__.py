"""Necks."""

from mmvim.models.necks.simple_fpn import SimpleFPN

__all__ = ['SimpleFPN']
