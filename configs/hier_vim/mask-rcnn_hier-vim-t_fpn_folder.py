# Any data set in COCO format: name its files as ../_base_/datasets/coco_folder.py says.
_base_ = '../mambavision/mask-rcnn_mambavision-t_fpn_folder.py'

model = dict(
    backbone=dict(_delete_=True, type='mmvim.HierVim', arch='tiny'),
    neck=dict(in_channels=[96, 192, 384, 768]),
)
