# Vim's setting with the plain transformer, attention over all patches.
_base_ = '../vim/upernet_vim-ti_8xb2-160k_ade20k-512x512.py'

model = dict(
    backbone=dict(
        _delete_=True,
        type='mmvim.VisionTransformer',
        arch='deit-tiny',
        img_size=512,
        out_indices=(2, 5, 8, 11),
        out_type='featmap',
    )
)
