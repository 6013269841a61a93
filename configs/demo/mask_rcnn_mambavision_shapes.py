# A small MambaVision that learns drawn shapes from scratch on two CPU cores in minutes.
_base_ = [
    'mmdet::_base_/models/mask-rcnn_r50_fpn.py',
    '../_base_/datasets/shapes_instance.py',
    '../_base_/default_runtime.py',
]

width, channels = 24, 64
roi_extractor = dict(
    out_channels=channels, featmap_strides=[4, 8, 16], finest_scale=24, roi_layer=dict(sampling_ratio=1)
)
model = dict(
    backbone=dict(
        _delete_=True,
        type='mmvim.MambaVision',
        arch=dict(embed_dims=width, stem_channels=16, depths=(1, 1, 4, 2), num_heads=(1, 2, 4, 8)),
        window_sizes=(8, 8, 8, 4),
    ),
    neck=dict(in_channels=[width, 2 * width, 4 * width, 8 * width], out_channels=channels, num_outs=4),
    rpn_head=dict(
        in_channels=channels,
        feat_channels=channels,
        anchor_generator=dict(scales=[4], strides=[4, 8, 16, 32]),
    ),
    roi_head=dict(
        bbox_roi_extractor=roi_extractor,
        bbox_head=dict(in_channels=channels, fc_out_channels=256, num_classes=4),
        mask_roi_extractor=roi_extractor,
        mask_head=dict(in_channels=channels, conv_out_channels=channels // 2, num_convs=2, num_classes=4),
    ),
    train_cfg=dict(
        rpn=dict(sampler=dict(num=64)),
        rpn_proposal=dict(nms_pre=500, max_per_img=200),
        rcnn=dict(sampler=dict(num=24)),
    ),
    test_cfg=dict(rpn=dict(nms_pre=500, max_per_img=100)),
)

max_iters = 700
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
default_hooks = dict(logger=dict(interval=20), checkpoint=dict(interval=10000))
randomness = dict(seed=0)
