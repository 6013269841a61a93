# DeiT-Ti as ViTDet's backbone: windows of 14x14 patches, and global attention in every third block.
vitdet = dict(
    type='mmvim.VisionTransformer',
    arch='deit-tiny',
    out_type='featmap',
    with_cls_token=False,
    window_size=14,
    global_attn_indexes=(2, 5, 8, 11),
    drop_path_rate=0.1,
)
