_base_ = './mask_rcnn_deit_ti_coco.py'

model = dict(backbone=dict(arch='deit-small'), neck=dict(in_channels=384))
