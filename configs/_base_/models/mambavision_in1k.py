# MambaVision with its classifier, as trained on ImageNet-1K.
embed_dims = 80

model = dict(
    type='ImageClassifier',
    backbone=dict(type='mmvim.MambaVision', arch='tiny', out_type='avg_featmap', drop_path_rate=0.2),
    head=dict(
        type='LinearClsHead',
        num_classes=1000,
        in_channels=8 * embed_dims,
        loss=dict(type='LabelSmoothLoss', label_smooth_val=0.1, mode='original'),
        init_cfg=dict(type='TruncNormal', layer='Linear', std=0.02, bias=0.0),
    ),
    train_cfg=dict(augments=[dict(type='Mixup', alpha=0.8), dict(type='CutMix', alpha=1.0)]),
)
