# The recipe of Vim with ViTDet's attention.
_base_ = ['../vim/mask_rcnn_vim_ti_coco.py', '../_base_/models/vitdet_deit.py']

model = dict(backbone=dict(_base_.vitdet, _delete_=True, img_size=_base_.image_size))
# Over 12 blocks as much as 0.837 over 24.
optim_wrapper = dict(paramwise_cfg=dict(_base_.vitdet_decay, decay_rate=0.7))
