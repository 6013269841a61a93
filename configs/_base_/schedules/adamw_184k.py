# 184,375 iterations at batch 64: 100 passes over COCO. Of all parameters, only positions have no weight decay.
train_cfg = dict(type='IterBasedTrainLoop', max_iters=184375, val_interval=5000)
val_cfg = dict(type='ValLoop')
test_cfg = dict(type='TestLoop')

optim_wrapper = dict(
    type='OptimWrapper',
    constructor='mmvim.LayerDecayOptimWrapperConstructor',
    optimizer=dict(type='AdamW', lr=1e-4, weight_decay=0.1),
    paramwise_cfg=dict(no_decay='positions', norm_decay_mult=1.0, bias_decay_mult=1.0, flat_decay_mult=1.0),
)
param_scheduler = [
    dict(type='LinearLR', start_factor=0.001, by_epoch=False, end=250),
    dict(type='MultiStepLR', by_epoch=False, milestones=[163889, 177546]),
]
auto_scale_lr = dict(enable=False, base_batch_size=64)
