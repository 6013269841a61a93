# Any folder of images and label maps: name its parts as ../_base_/datasets/label_maps_folder.py says.
_base_ = [
    '../_base_/models/upernet_vim.py',
    '../_base_/datasets/label_maps_folder.py',
    '../_base_/schedules/adamw_5k.py',
    '../_base_/segmentation_runtime.py',
]

auto_scale_lr = dict(base_batch_size=4)
