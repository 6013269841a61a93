_base_ = './mambavision-t_32xb128_in1k.py'

embed_dims = 96
model = dict(backbone=dict(arch='small'), head=dict(in_channels=8 * embed_dims))

# The middle 0.93 of the image are tested.
test_pipeline = _base_.test_pipeline
test_pipeline[1].scale = 240
val_dataloader = dict(dataset=dict(pipeline=test_pipeline))
test_dataloader = val_dataloader
