# Any data set in COCO format. Class names and their number come from the annotation file. Name the files with
#   --cfg-options data_root=FOLDER train_ann=FILE val_ann=FILE train_img=FOLDER val_img=FOLDER
# (all but data_root may be relative to it), or in a config that inherits this one. mmvim.Runner, which tools/train.py
# and the hosts' own tools use for this config, hands these keys to whatever leaves the setting of that meaning open.
_base_ = './cascade_mask_rcnn_vim_ti_coco.py'

data_root = 'data/my_data'
train_ann = 'annotations/train.json'
val_ann = 'annotations/val.json'
train_img = 'train'
val_img = 'val'
classes = None  # names in the order of the model's outputs, None: those of train_ann
skip_bad_images = False  # leave unreadable images out instead of ending the run
image_size = 1024  # shorter side, pixels; the longer one is at most 1333 / 800 of it
max_iters = 5000

model = dict(data_preprocessor=dict(batch_augments=None), backbone=dict(img_size=None))

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
    dataset=dict(_delete_=True, type='mmvim.CocoFolderDataset', pipeline=train_pipeline),
)
val_dataloader = dict(
    dataset=dict(_delete_=True, type='mmvim.CocoFolderDataset', test_mode=True, pipeline=test_pipeline)
)
test_dataloader = val_dataloader
val_evaluator = dict(_delete_=True, type='mmvim.CocoFolderMetric', metric=['bbox', 'segm'])
test_evaluator = val_evaluator

# Without ImageNet weights a lower rate for the early layers would only hold them back.
optim_wrapper = dict(paramwise_cfg=dict(decay_rate=1.0), clip_grad=dict(max_norm=1.0))
train_cfg = dict(_delete_=True, type='IterBasedTrainLoop', val_interval=1000)
param_scheduler = [
    dict(type='LinearLR', start_factor=0.01, by_epoch=False, end=100),
    dict(type='PolyLR', by_epoch=False, eta_min=1e-6),
]
default_hooks = dict(logger=dict(interval=10), checkpoint=dict(interval=1000))
auto_scale_lr = dict(base_batch_size=2)
