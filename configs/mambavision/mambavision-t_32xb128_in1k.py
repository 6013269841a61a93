_base_ = [
    '../_base_/models/mambavision_in1k.py',
    'mmpretrain::_base_/datasets/imagenet_bs64_swin_224.py',
    '../_base_/schedules/lamb_300e_in1k.py',
    'mmpretrain::_base_/default_runtime.py',
]
runner_type = 'mmvim.Runner'

# The image is tested whole: its shorter side becomes 224 pixels.
test_pipeline = _base_.test_pipeline
test_pipeline[1].scale = 224
train_dataloader = dict(batch_size=128)
val_dataloader = dict(batch_size=128, dataset=dict(pipeline=test_pipeline))
test_dataloader = val_dataloader
