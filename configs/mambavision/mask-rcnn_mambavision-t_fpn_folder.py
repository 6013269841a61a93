# Any data set in COCO format: name its files as ../_base_/datasets/coco_folder.py says. Windows are fitted to the maps,
# so that images of any size cost no more than they must.
_base_ = [
    'mmdet::_base_/models/mask-rcnn_r50_fpn.py',
    '../_base_/datasets/coco_folder.py',
    '../_base_/schedules/adamw_5k.py',
    '../_base_/default_runtime.py',
]

model = dict(
    backbone=dict(_delete_=True, type='mmvim.MambaVision', arch='tiny', window_sizes=(8, 8, 112, 56), fit_windows=True),
    neck=dict(in_channels=[80, 160, 320, 640]),
)
default_hooks = dict(logger=dict(interval=10), checkpoint=dict(interval=1000))
