# A small MambaVision that learns to label the pixels of drawn shapes from scratch on two CPU cores in minutes.
_base_ = [
    'mmseg::_base_/models/upernet_swin.py',
    '../_base_/datasets/shapes_semantic.py',
    'mmseg::_base_/default_runtime.py',
]
runner_type = 'mmvim.Runner'

width, channels = 24, 48
norm_cfg = dict(type='BN')
loss = dict(class_weight=[0.2, 1, 1, 1, 1])  # most pixels are background
model = dict(
    data_preprocessor=dict(size=(128, 128)),
    backbone=dict(
        _delete_=True,
        type='mmvim.MambaVision',
        arch=dict(embed_dims=width, stem_channels=16, depths=(1, 1, 4, 2), num_heads=(1, 2, 4, 8)),
        window_sizes=(8, 8, 8, 4),
    ),
    decode_head=dict(
        in_channels=[width, 2 * width, 4 * width, 8 * width],
        channels=channels,
        num_classes=5,
        norm_cfg=norm_cfg,
        loss_decode=loss,
    ),
    auxiliary_head=dict(in_channels=4 * width, channels=channels, num_classes=5, norm_cfg=norm_cfg, loss_decode=loss),
)

max_iters = 1400
train_cfg = dict(type='IterBasedTrainLoop', val_interval=10000)
val_cfg = dict(type='ValLoop')
test_cfg = dict(type='TestLoop')
optim_wrapper = dict(
    type='OptimWrapper',
    constructor='mmvim.LayerDecayOptimWrapperConstructor',
    optimizer=dict(type='AdamW', lr=2e-3, weight_decay=0.05),
    clip_grad=dict(max_norm=1.0),
)
param_scheduler = [
    dict(type='LinearLR', start_factor=0.01, by_epoch=False, end=50),
    dict(type='PolyLR', by_epoch=False),
]
default_hooks = dict(
    logger=dict(type='LoggerHook', interval=20, log_metric_by_epoch=False),
    checkpoint=dict(type='CheckpointHook', by_epoch=False, interval=10000),
    visualization=dict(type='SegVisualizationHook'),
)
randomness = dict(seed=0)
