"""Optimiser wrappers and constructors, the runner and its checks."""

from mmvim.engine.amp import AmpOptimWrapper
from mmvim.engine.hooks import CheckpointFitHook, ClassCountHook, LabelMapHook
from mmvim.engine.layer_decay import LayerDecayOptimWrapperConstructor
from mmvim.engine.randomness import EpochBasedTrainLoop, RandomStateHook
from mmvim.engine.resuming import ResumeHook
from mmvim.engine.runner import Runner
from mmvim.engine.time_split import TimeSplitHook

__all__ = [
    'AmpOptimWrapper',
    'CheckpointFitHook',
    'ClassCountHook',
    'EpochBasedTrainLoop',
    'LabelMapHook',
    'LayerDecayOptimWrapperConstructor',
    'RandomStateHook',
    'ResumeHook',
    'Runner',
    'TimeSplitHook',
]
