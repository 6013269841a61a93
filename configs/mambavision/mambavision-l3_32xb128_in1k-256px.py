# Windows as large as the maps. The published weights for this size were pre-trained on ImageNet-21K.
_base_ = './mambavision-l3_32xb128_in1k-512px.py'

image_size = 256
model = dict(backbone=dict(window_sizes=(8, 8, image_size // 16, image_size // 32)))

train_pipeline, test_pipeline = _base_.train_pipeline, _base_.test_pipeline
train_pipeline[1].scale = image_size
test_pipeline[1].scale = test_pipeline[2].crop_size = image_size
train_dataloader = dict(dataset=dict(pipeline=train_pipeline))
val_dataloader = dict(dataset=dict(pipeline=test_pipeline))
test_dataloader = val_dataloader
