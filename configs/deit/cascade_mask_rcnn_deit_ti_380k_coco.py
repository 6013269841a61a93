# The paper's schedule for its baseline: linear decay over 380K iterations, one learning rate for all layers.
_base_ = '../vim/cascade_mask_rcnn_vim_ti_380k_coco.py'

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
