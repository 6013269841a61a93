_base_ = '../vim/upernet_vim-ti_camvid-240x180.py'

model = dict(
    backbone=dict(
        _delete_=True,
        type='mmvim.VisionTransformer',
        arch='deit-tiny',
        img_size=_base_.crop_size,
        out_indices=(2, 5, 8, 11),
        out_type='featmap',
    )
)
