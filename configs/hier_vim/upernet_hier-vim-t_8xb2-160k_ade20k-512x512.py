# Heads, data and schedule are those of MMSegmentation's Swin. Start from ImageNet weights with
#   --cfg-options model.backbone.init_cfg.type=Pretrained model.backbone.init_cfg.checkpoint=FILE
_base_ = 'mmseg::swin/swin-tiny-patch4-window7-in1k-pre_upernet_8xb2-160k_ade20k-512x512.py'
runner_type = 'mmvim.Runner'

model = dict(backbone=dict(_delete_=True, type='mmvim.HierVim', arch='tiny', drop_path_rate=0.3))
optim_wrapper = dict(
    _delete_=True,
    type='OptimWrapper',
    constructor='mmvim.LayerDecayOptimWrapperConstructor',
    optimizer=dict(type='AdamW', lr=6e-5, weight_decay=0.01),
)
auto_scale_lr = dict(enable=False, base_batch_size=16)
