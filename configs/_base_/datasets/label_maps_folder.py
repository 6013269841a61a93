# Any folder of images and label maps: one byte per pixel, the number of its class. An image and its label map have the
# same name up to the suffix. mmvim.Runner passes the keys below to every part that leaves the setting open. Set them
# with
#   --cfg-options data_root=FOLDER classes="[road,sky]" img_suffix=.png
# (folders may be relative to data_root), or in a config that inherits this one.
data_root = 'data/my_data'
train_img, train_ann = 'images/train', 'annotations/train'
val_img, val_ann = 'images/val', 'annotations/val'
img_suffix, seg_map_suffix = '.jpg', '.png'
classes = None  # names of the values 0, 1, ... in this order; they must be given
ignore_index = 255  # the value of unlabelled pixels
reduce_zero_label = False  # True: 0 is not labelled either, and the first class is 1
image_size = 512  # shorter side, pixels; the longer one is at most 4 times as long; or (width, height) of the frame
crop_size = None  # (height, width) of the training images; None: squares of image_size

train_pipeline = [
    dict(type='LoadImageFromFile'),
    dict(type='LoadAnnotations'),
    dict(type='RandomResize', ratio_range=(0.5, 1.5), keep_ratio=True),
    dict(type='RandomCrop', cat_max_ratio=0.75),
    dict(type='RandomFlip', prob=0.5),
    dict(type='PhotoMetricDistortion'),
    dict(type='PackSegInputs'),
]
test_pipeline = [
    dict(type='LoadImageFromFile'),
    dict(type='Resize', keep_ratio=True),
    dict(type='LoadAnnotations'),
    dict(type='PackSegInputs'),
]
train_dataloader = dict(
    batch_size=4,
    num_workers=2,
    persistent_workers=True,
    sampler=dict(type='InfiniteSampler'),
    dataset=dict(type='BaseSegDataset', pipeline=train_pipeline),
)
val_dataloader = dict(
    batch_size=1,
    num_workers=2,
    persistent_workers=True,
    sampler=dict(type='DefaultSampler', shuffle=False),
    dataset=dict(type='BaseSegDataset', test_mode=True, pipeline=test_pipeline),
)
test_dataloader = val_dataloader
val_evaluator = dict(type='IoUMetric', iou_metrics=['mIoU'])
test_evaluator = val_evaluator
