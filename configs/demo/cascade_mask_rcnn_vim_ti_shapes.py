# A small Vim that learns drawn shapes from scratch on two CPU cores in minutes.
_base_ = [
    '../_base_/models/cascade-mask-rcnn_vim.py',
    '../_base_/datasets/shapes_instance.py',
    '../_base_/default_runtime.py',
]

width, channels = 96, 64
strides = [8, 16, 32]
roi_extractor = dict(
    out_channels=channels, featmap_strides=strides[:2], finest_scale=48, roi_layer=dict(sampling_ratio=1)
)
model = dict(
    backbone=dict(
        arch=dict(_delete_=True, embed_dims=width, depth=4),
        img_size=128,
        patch_size=8,
        drop_path_rate=0.0,
        rotary=None,  # the angles of the residual stream take a small model long to see through
    ),
    neck=dict(in_channels=width, out_channels=channels, scales=(1, 0.5), num_outs=3),
    rpn_head=dict(in_channels=channels, feat_channels=channels, anchor_generator=dict(scales=[4], strides=strides)),
    roi_head=dict(
        num_classes=4,
        # MMDetection's way to train a cascade, not the released detectors'
        stage_loss_weights=(1.0, 0.5, 0.25),
        scale_gradient=False,
        resample=True,
        bbox_roi_extractor=roi_extractor,
        bbox_head=dict(
            type='ConvFCBBoxHead',
            num_shared_convs=2,
            num_shared_fcs=1,
            in_channels=channels,
            conv_out_channels=channels // 2,
            fc_out_channels=256,
        ),
        mask_roi_extractor=roi_extractor,
        mask_head=dict(in_channels=channels, conv_out_channels=channels // 2, num_convs=2),
    ),
    train_cfg=dict(
        rpn=dict(sampler=dict(num=64)),
        rpn_proposal=dict(nms_pre=500, max_per_img=200),
        rcnn=dict(sampler=dict(num=24)),
    ),
    test_cfg=dict(rpn=dict(nms_pre=500, max_per_img=100)),
)

max_iters = 800
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
