# From random weights on 100 street scenes, with heads small enough for a CPU: an example for label maps of your own.
_base_ = [
    'mmseg::_base_/models/upernet_swin.py',
    '../_base_/datasets/camvid.py',
    'mmseg::_base_/default_runtime.py',
]
runner_type = 'mmvim.Runner'

channels, num_classes = 96, len(_base_.classes)
head = dict(channels=channels, num_classes=num_classes, ignore_index=_base_.ignore_index, norm_cfg=dict(type='BN'))
model = dict(
    data_preprocessor=dict(size=(160, 192), seg_pad_val=_base_.ignore_index),
    backbone=dict(_delete_=True, type='mmvim.MambaVision', arch='tiny', window_sizes=(8, 8, 64, 32), fit_windows=True),
    decode_head=dict(head, in_channels=[80, 160, 320, 640]),
    auxiliary_head=dict(head, in_channels=320),
)

max_iters = 500
train_cfg = dict(type='IterBasedTrainLoop', val_interval=100)
val_cfg = dict(type='ValLoop')
test_cfg = dict(type='TestLoop')
optim_wrapper = dict(
    type='OptimWrapper',
    constructor='mmvim.LayerDecayOptimWrapperConstructor',
    optimizer=dict(type='AdamW', lr=5e-4, weight_decay=0.05),
    clip_grad=dict(max_norm=1.0),
)
param_scheduler = [
    dict(type='LinearLR', start_factor=0.01, by_epoch=False, end=50),
    dict(type='PolyLR', by_epoch=False),
]
default_hooks = dict(
    logger=dict(type='LoggerHook', interval=10, log_metric_by_epoch=False),
    checkpoint=dict(type='CheckpointHook', by_epoch=False, interval=10000),
    visualization=dict(type='SegVisualizationHook'),
)
randomness = dict(seed=0)
