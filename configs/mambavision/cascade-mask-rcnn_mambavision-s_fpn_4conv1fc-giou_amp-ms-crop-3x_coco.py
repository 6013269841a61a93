_base_ = './cascade-mask-rcnn_mambavision-t_fpn_4conv1fc-giou_amp-ms-crop-3x_coco.py'

model = dict(backbone=dict(arch='small', drop_path_rate=0.3), neck=dict(in_channels=[96, 192, 384, 768]))
