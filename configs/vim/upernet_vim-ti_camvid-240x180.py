# From random weights on 100 street scenes, with heads small enough for a CPU; data and heads are MambaVision's.
_base_ = '../mambavision/upernet_mambavision-t_camvid-240x180.py'

embed_dims = 192
model = dict(
    backbone=dict(
        _delete_=True,
        type='mmvim.VisionMamba',
        arch='tiny',
        img_size=_base_.crop_size,
        out_indices=(5, 11, 17, 23),
        out_type='featmap',
        cls_token=None,
    ),
    neck=dict(type='Feature2Pyramid', embed_dim=embed_dims, norm_cfg=dict(type='BN')),
    decode_head=dict(in_channels=[embed_dims] * 4),
    auxiliary_head=dict(in_channels=embed_dims),
)

max_iters = 900
