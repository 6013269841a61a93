# The paper's schedule: linear decay over 380K iterations, one learning rate for all layers.
_base_ = './cascade_mask_rcnn_vim_ti_coco.py'

max_iters = 380000
warmup = _base_.param_scheduler[0]
train_cfg = dict(max_iters=max_iters)
optim_wrapper = dict(paramwise_cfg=dict(decay_rate=1.0))
param_scheduler = [
    warmup,
    dict(type='LinearLR', by_epoch=False, begin=warmup.end, end=max_iters, start_factor=1, end_factor=0),
]
