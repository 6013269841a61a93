# A folder of images for each class, such as data/flowers/train/daisy/1.jpg. mmvim.Runner passes the keys below to every
# part that leaves the setting open, and the number of classes to head and preprocessor. Set them with
#   --cfg-options data_root=FOLDER train_img=FOLDER val_img=FOLDER
# (folders may be relative to data_root), or in a config that inherits this one.
data_root = 'data/my_data'
train_img = 'train'
val_img = 'val'
classes = None  # names in the order of the model's outputs, None: those of the folders in train_img
skip_bad_images = False  # leave unreadable images out instead of ending the run
image_size = 224  # side of the square that the model sees, pixels

data_preprocessor = dict(mean=[123.675, 116.28, 103.53], std=[58.395, 57.12, 57.375], to_rgb=True)
train_pipeline = [
    dict(type='LoadImageFromFile'),
    dict(type='RandomResizedCrop', backend='pillow', interpolation='bicubic'),
    dict(type='RandomFlip', prob=0.5),
    dict(type='PackInputs'),
]
test_pipeline = [
    dict(type='LoadImageFromFile'),
    dict(type='ResizeEdge', edge='short', backend='pillow', interpolation='bicubic'),
    dict(type='CenterCrop'),
    dict(type='PackInputs'),
]
train_dataloader = dict(
    batch_size=32,
    num_workers=2,
    persistent_workers=True,
    sampler=dict(type='InfiniteSampler'),
    dataset=dict(type='mmvim.ClassFolderDataset', pipeline=train_pipeline),
)
val_dataloader = dict(
    batch_size=32,
    num_workers=2,
    persistent_workers=True,
    sampler=dict(type='DefaultSampler', shuffle=False),
    dataset=dict(type='mmvim.ClassFolderDataset', test_mode=True, pipeline=test_pipeline),
)
test_dataloader = val_dataloader
val_evaluator = dict(type='Accuracy', topk=1)
test_evaluator = val_evaluator
