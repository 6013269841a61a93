_base_ = './upernet_mambavision-t_8xb2-160k_ade20k-512x512.py'

model = dict(
    backbone=dict(arch='small', window_sizes=(8, 8, 160, 56), drop_path_rate=0.7),
    decode_head=dict(in_channels=[96, 192, 384, 768]),
    auxiliary_head=dict(in_channels=384),
)
optim_wrapper = dict(optimizer=dict(lr=6e-5))
