# The recipe of Vim with ViTDet's attention: windows of 14 patches, and global attention in every third block.
_base_ = '../vim/mask_rcnn_vim_ti_coco.py'

model = dict(
    backbone=dict(
        _delete_=True,
        type='mmvim.VisionTransformer',
        arch='deit-tiny',
        img_size=_base_.image_size,
        out_type='featmap',
        with_cls_token=False,
        window_size=14,
        global_attn_indexes=(2, 5, 8, 11),
        drop_path_rate=0.1,
    )
)
# Over 12 blocks as much as 0.837 over 24.
optim_wrapper = dict(paramwise_cfg=dict(decay_rate=0.7))
