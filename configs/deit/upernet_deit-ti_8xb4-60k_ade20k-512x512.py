# Vim's released recipe, whose layer decay does reach DeiT's blocks; over 12 blocks as much as it was meant to over 24.
_base_ = '../vim/upernet_vim-ti_8xb4-60k_ade20k-512x512.py'

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
optim_wrapper = dict(paramwise_cfg=dict(decay_rate=0.92**2, decay_scope='all'))
