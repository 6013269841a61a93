_base_ = './upernet_vim-ti_8xb2-160k_ade20k-512x512.py'

embed_dims = 384
model = dict(
    backbone=dict(arch='small', rotary='both', feature_source='residual'),
    neck=dict(embed_dim=embed_dims),
    decode_head=dict(in_channels=[embed_dims] * 4, channels=embed_dims),
    auxiliary_head=dict(in_channels=embed_dims),
)
