_base_ = [
    '../_base_/models/vim_in1k.py',
    'mmpretrain::_base_/datasets/imagenet_bs64_swin_224.py',
    '../_base_/schedules/adamw_300e_in1k.py',
    'mmpretrain::_base_/default_runtime.py',
]
runner_type = 'mmvim.Runner'

train_dataloader = dict(batch_size=128, sampler=dict(type='RepeatAugSampler'))
val_dataloader = dict(batch_size=128)
test_dataloader = val_dataloader
optim_wrapper = dict(optimizer=dict(weight_decay=0.1))
