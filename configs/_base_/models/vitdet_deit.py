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
# detectron2 knows PyTorch's norms, which only the backbone has, and gives them no weight decay.
vitdet_decay = dict(custom_keys={'backbone.blocks.*.norm?.*': dict(decay_mult=0.0)})
