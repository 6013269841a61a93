# Any data set in COCO format: name its files as ../_base_/datasets/coco_folder.py says. mmvim.Runner, which
# tools/train.py and the hosts' own tools use for this config, reads the classes from them.
_base_ = [
    '../_base_/models/cascade-mask-rcnn_vim.py',
    '../_base_/datasets/coco_folder.py',
    '../_base_/schedules/adamw_5k.py',
    '../_base_/default_runtime.py',
]
image_size = 1024

# The published ImageNet weights were trained without rotary embedding.
model = dict(backbone=dict(img_size=image_size, rotary=None))
# Without ImageNet weights a lower rate for the early layers would only hold them back.
optim_wrapper = dict(optimizer=dict(weight_decay=0.1), paramwise_cfg=dict(decay_rate=1.0))
default_hooks = dict(logger=dict(interval=10), checkpoint=dict(interval=1000))
