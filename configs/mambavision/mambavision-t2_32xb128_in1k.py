_base_ = './mambavision-t_32xb128_in1k.py'

model = dict(backbone=dict(arch='tiny2'))

# The middle 0.98 of the image are tested.
test_pipeline = _base_.test_pipeline
test_pipeline[1].scale = 228
val_dataloader = dict(dataset=dict(pipeline=test_pipeline))
test_dataloader = val_dataloader
