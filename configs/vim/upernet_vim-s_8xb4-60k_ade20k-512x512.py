_base_ = './upernet_vim-ti_8xb4-60k_ade20k-512x512.py'

embed_dims = 384
model = dict(
    backbone=dict(arch='small', rotary='both', feature_source='residual'),
    neck=dict(embed_dim=embed_dims),
    decode_head=dict(in_channels=[embed_dims] * 4, channels=embed_dims),
    auxiliary_head=dict(in_channels=embed_dims),
)
optim_wrapper = dict(optimizer=dict(lr=1e-4, weight_decay=0.05), paramwise_cfg=dict(decay_rate=0.95))
