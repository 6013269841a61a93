"""Optimiser constructors and hooks."""

from mmvim.engine.layer_decay import LayerDecayOptimWrapperConstructor

__all__ = ['LayerDecayOptimWrapperConstructor']
