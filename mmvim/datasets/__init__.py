"""Data sets and transforms. Those derived from MMDetection's are in modules that the registry imports by name."""

from mmvim.datasets.shapes import ensure_shapes, shapes_recipe
from mmvim.datasets.transforms import LoadImageFromFile

__all__ = ['LoadImageFromFile', 'ensure_shapes', 'shapes_recipe']
