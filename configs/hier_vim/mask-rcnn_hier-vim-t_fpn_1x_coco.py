# Heads, data and schedule are those of MMDetection's Swin. Start from ImageNet weights with
#   --cfg-options model.backbone.init_cfg.type=Pretrained model.backbone.init_cfg.checkpoint=FILE
_base_ = 'mmdet::swin/mask-rcnn_swin-t-p4-w7_fpn_1x_coco.py'
runner_type = 'mmvim.Runner'

model = dict(backbone=dict(_delete_=True, type='mmvim.HierVim', arch='tiny', drop_path_rate=0.2))
optim_wrapper = dict(
    _delete_=True,
    type='OptimWrapper',
    constructor='mmvim.LayerDecayOptimWrapperConstructor',
    optimizer=dict(type='AdamW', lr=1e-4, weight_decay=0.05),
)
