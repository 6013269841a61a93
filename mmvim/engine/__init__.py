"""Optimiser wrappers and constructors, the runner and its checks."""

from mmvim.engine.amp import AmpOptimWrapper
from mmvim.engine.class_labels import ClassLabelHook
from mmvim.engine.hooks import CheckpointFitHook, ClassCountHook
from mmvim.engine.label_maps import LabelMapHook
from mmvim.engine.layer_decay import LayerDecayOptimWrapperConstructor
from mmvim.engine.runner import Runner
from mmvim.engine.time_split import TimeSplitHook

__all__ = [
    'AmpOptimWrapper',
    'CheckpointFitHook',
    'ClassCountHook',
    'ClassLabelHook',
    'LabelMapHook',
    'LayerDecayOptimWrapperConstructor',
    'Runner',
    'TimeSplitHook',
]
