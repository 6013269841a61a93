"""Optimiser wrappers and constructors, the runner and its checks."""

from mmvim.engine.amp import AmpOptimWrapper
from mmvim.engine.batch_norm import BatchNormHook
from mmvim.engine.class_labels import ClassLabelHook
from mmvim.engine.finite import FiniteHook
from mmvim.engine.hooks import CheckpointFitHook, ClassCountHook
from mmvim.engine.integrity import DigestHook
from mmvim.engine.label_maps import LabelMapHook
from mmvim.engine.layer_decay import LayerDecayOptimWrapperConstructor
from mmvim.engine.loops import LoopHook
from mmvim.engine.randomness import EpochBasedTrainLoop, RandomStateHook
from mmvim.engine.resuming import ResumeHook
from mmvim.engine.runner import Runner
from mmvim.engine.time_split import TimeSplitHook

__all__ = [
    'AmpOptimWrapper',
    'BatchNormHook',
    'CheckpointFitHook',
    'ClassCountHook',
    'ClassLabelHook',
    'DigestHook',
    'EpochBasedTrainLoop',
    'FiniteHook',
    'LabelMapHook',
    'LayerDecayOptimWrapperConstructor',
    'LoopHook',
    'RandomStateHook',
    'ResumeHook',
    'Runner',
    'TimeSplitHook',
]
