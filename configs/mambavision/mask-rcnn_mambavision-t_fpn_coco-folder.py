# Any data set in COCO format: name its files as ../_base_/datasets/coco_folder.py says. Windows are fitted to the maps,
# so that images of any size cost no more than they must.
_base_ = [
    'mmdet::_base_/models/mask-rcnn_r50_fpn.py',
    '../_base_/datasets/coco_folder.py',
    '../_base_/default_runtime.py',
]

model = dict(
    backbone=dict(_delete_=True, type='mmvim.MambaVision', arch='tiny', window_sizes=(8, 8, 112, 56), fit_windows=True),
    neck=dict(in_channels=[80, 160, 320, 640]),
)

max_iters = 5000
train_cfg = dict(type='IterBasedTrainLoop', val_interval=1000)
val_cfg = dict(type='ValLoop')
test_cfg = dict(type='TestLoop')
optim_wrapper = dict(
    type='OptimWrapper',
    constructor='mmvim.LayerDecayOptimWrapperConstructor',
    optimizer=dict(type='AdamW', lr=1e-4, weight_decay=0.05),
    clip_grad=dict(max_norm=1.0),
)
param_scheduler = [
    dict(type='LinearLR', start_factor=0.01, by_epoch=False, end=100),
    dict(type='PolyLR', by_epoch=False, eta_min=1e-6),
]
default_hooks = dict(logger=dict(interval=10), checkpoint=dict(interval=1000))
auto_scale_lr = dict(base_batch_size=2)
