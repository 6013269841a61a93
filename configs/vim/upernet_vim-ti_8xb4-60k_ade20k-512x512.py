# The released recipe: higher rates, lowered for the embedding alone, and tests in overlapping windows. Rates that fall
# with depth, which it meant, are optim_wrapper.paramwise_cfg.decay_scope=all.
_base_ = './upernet_vim-ti_8xb2-160k_ade20k-512x512.py'

max_iters = 60000
model = dict(test_cfg=dict(mode='slide', crop_size=(512, 512), stride=(341, 341)))
train_dataloader = dict(batch_size=4)
train_cfg = dict(max_iters=max_iters, val_interval=6000)
optim_wrapper = dict(
    optimizer=dict(lr=2e-4, weight_decay=0.1), paramwise_cfg=dict(decay_rate=0.92, decay_scope='embedding')
)
warmup, decay = _base_.param_scheduler
decay.end = max_iters
param_scheduler = [warmup, decay]
default_hooks = dict(checkpoint=dict(interval=6000))
auto_scale_lr = dict(base_batch_size=32)
