# A folder of images for each class: name its parts as ../_base_/datasets/class_folders.py says.
_base_ = [
    '../_base_/models/vim_in1k.py',
    '../_base_/datasets/class_folders.py',
    '../_base_/schedules/adamw_5k.py',
    '../_base_/classification_runtime.py',
]

model = dict(backbone=dict(img_size=224))
auto_scale_lr = dict(base_batch_size=32)
