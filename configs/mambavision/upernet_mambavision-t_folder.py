# Any folder of images and label maps: name its parts as ../_base_/datasets/label_maps_folder.py says. Windows are
# fitted to the maps, so that images of any size cost no more than they must.
_base_ = [
    'mmseg::_base_/models/upernet_swin.py',
    '../_base_/datasets/label_maps_folder.py',
    '../_base_/schedules/adamw_5k.py',
    '../_base_/segmentation_runtime.py',
]

model = dict(
    data_preprocessor=dict(size=(512, 512)),
    backbone=dict(_delete_=True, type='mmvim.MambaVision', arch='tiny', window_sizes=(8, 8, 64, 32), fit_windows=True),
    decode_head=dict(in_channels=[80, 160, 320, 640]),
    auxiliary_head=dict(in_channels=320),
)
auto_scale_lr = dict(base_batch_size=4)
