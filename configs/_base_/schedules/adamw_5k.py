# 5,000 iterations from random weights, a start for data of one's own; max_iters alone changes the number.
max_iters = 5000
train_cfg = dict(type='IterBasedTrainLoop', val_interval=1000)
val_cfg = dict(type='ValLoop')
test_cfg = dict(type='TestLoop')

optim_wrapper = dict(
    type='OptimWrapper',
    constructor='mmvim.LayerDecayOptimWrapperConstructor',
    optimizer=dict(type='AdamW', lr=1e-4, weight_decay=0.05),
    clip_grad=dict(max_norm=1.0),
)
param_scheduler = [
    dict(type='LinearLR', start_factor=0.01, by_epoch=False, end=100),
    dict(type='PolyLR', by_epoch=False, eta_min=1e-6),
]
auto_scale_lr = dict(enable=False, base_batch_size=2)
