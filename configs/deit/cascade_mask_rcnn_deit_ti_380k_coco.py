# The paper's schedule for its baseline: linear decay over 380K iterations, one learning rate for all layers.
_base_ = ['../vim/cascade_mask_rcnn_vim_ti_380k_coco.py', '../_base_/models/vitdet_deit.py']

model = dict(backbone=dict(_base_.vitdet, _delete_=True, img_size=_base_.image_size))
optim_wrapper = dict(paramwise_cfg=_base_.vitdet_decay)
