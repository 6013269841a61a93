# UperNet on four maps of one plain backbone, resampled to strides 4 to 32; heads as wide as the backbone.
_base_ = 'mmseg::_base_/models/upernet_beit.py'

embed_dims = 192
model = dict(
    data_preprocessor=dict(size=(512, 512)),
    backbone=dict(
        _delete_=True,
        type='mmvim.VisionMamba',
        arch='tiny',
        img_size=512,
        out_indices=(5, 11, 17, 23),
        out_type='featmap',
        cls_token=None,
    ),
    neck=dict(embed_dim=embed_dims),
    decode_head=dict(in_channels=[embed_dims] * 4, channels=embed_dims),
    auxiliary_head=dict(in_channels=embed_dims),
)
