"""Optimiser wrappers and constructors, the runner and its checks."""

from mmvim.engine.amp import AmpOptimWrapper
from mmvim.engine.hooks import CheckpointFitHook, ClassCountHook, LabelMapHook
from mmvim.engine.integrity import DigestHook
from mmvim.engine.layer_decay import LayerDecayOptimWrapperConstructor
from mmvim.engine.runner import Runner
from mmvim.engine.time_split import TimeSplitHook

__all__ = [
    'AmpOptimWrapper',
    'CheckpointFitHook',
    'ClassCountHook',
    'DigestHook',
    'LabelMapHook',
    'LayerDecayOptimWrapperConstructor',
    'Runner',
    'TimeSplitHook',
]
