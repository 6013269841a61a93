# Augmentation and schedule are those of MMPretrain's Swin.
_base_ = 'mmpretrain::swin_transformer/swin-tiny_16xb64_in1k.py'
runner_type = 'mmvim.Runner'

model = dict(
    backbone=dict(_delete_=True, type='mmvim.HierVim', arch='tiny', out_type='avg_featmap', drop_path_rate=0.2),
    neck=None,
)
optim_wrapper = dict(
    _delete_=True,
    type='OptimWrapper',
    constructor='mmvim.LayerDecayOptimWrapperConstructor',
    optimizer=dict(type='AdamW', lr=1e-3, weight_decay=0.05),
    clip_grad=dict(max_norm=5.0),
)
