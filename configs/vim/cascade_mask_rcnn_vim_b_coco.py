_base_ = './cascade_mask_rcnn_vim_ti_coco.py'

model = dict(backbone=dict(arch='base'), neck=dict(in_channels=768))
optim_wrapper = dict(paramwise_cfg=dict(decay_rate=0.7))
