# A folder of images for each class: name its parts as ../_base_/datasets/class_folders.py says. Windows are fitted to
# the maps, so that images of any size cost no more than they must.
_base_ = [
    '../_base_/models/mambavision_in1k.py',
    '../_base_/datasets/class_folders.py',
    '../_base_/schedules/adamw_5k.py',
    '../_base_/classification_runtime.py',
]

model = dict(backbone=dict(fit_windows=True))
auto_scale_lr = dict(base_batch_size=32)
