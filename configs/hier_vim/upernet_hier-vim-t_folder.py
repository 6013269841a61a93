# Any folder of images and label maps: name its parts as ../_base_/datasets/label_maps_folder.py says.
_base_ = '../mambavision/upernet_mambavision-t_folder.py'

model = dict(
    backbone=dict(_delete_=True, type='mmvim.HierVim', arch='tiny'),
    decode_head=dict(in_channels=[96, 192, 384, 768]),
    auxiliary_head=dict(in_channels=384),
)
