# Any data set in COCO format; class names and their number come from the annotation file. mmvim.Runner passes the keys
# below to every part that leaves the setting open. Name the files with
#   --cfg-options data_root=FOLDER train_ann=FILE val_ann=FILE train_img=FOLDER val_img=FOLDER
# (all but data_root may be relative to it), or in a config that inherits this one.
data_root = 'data/my_data'
train_ann = 'annotations/train.json'
val_ann = 'annotations/val.json'
train_img = 'train'
val_img = 'val'
classes = None  # names in the order of the model's outputs, all or some of train_ann's; None: all
skip_bad_images = False  # leave unreadable images out instead of ending the run
images_outside = False  # follow file names and links that lead out of the image folder
value_range = None  # values of black and white in the images, such as (0, 4095); None: images of 8 bits
image_size = 800  # shorter side, pixels; the longer one is at most 1333 / 800 of it

train_pipeline = [
    dict(type='mmvim.LoadImageFromFile'),
    dict(type='LoadAnnotations', with_bbox=True, with_mask=True),
    dict(type='RandomResize', ratio_range=(0.5, 1.5), resize_type='mmvim.Resize', keep_ratio=True),
    dict(type='RandomCrop', recompute_bbox=True, allow_negative_crop=True),
    dict(type='FilterAnnotations', min_gt_bbox_wh=(1, 1), keep_empty=False),
    dict(type='RandomFlip', prob=0.5),
    dict(type='PackDetInputs'),
]
test_pipeline = [
    dict(type='mmvim.LoadImageFromFile'),
    dict(type='mmvim.Resize', keep_ratio=True),
    dict(type='LoadAnnotations', with_bbox=True, with_mask=True),
    dict(type='PackDetInputs', meta_keys=('img_id', 'img_path', 'ori_shape', 'img_shape', 'scale_factor')),
]
train_dataloader = dict(
    batch_size=2,
    num_workers=2,
    persistent_workers=True,
    sampler=dict(type='InfiniteSampler'),
    dataset=dict(type='mmvim.CocoFolderDataset', pipeline=train_pipeline),
)
val_dataloader = dict(
    batch_size=1,
    num_workers=2,
    persistent_workers=True,
    sampler=dict(type='DefaultSampler', shuffle=False),
    dataset=dict(type='mmvim.CocoFolderDataset', test_mode=True, pipeline=test_pipeline),
)
test_dataloader = val_dataloader
val_evaluator = dict(type='mmvim.CocoFolderMetric', metric=['bbox', 'segm'])
test_evaluator = val_evaluator
