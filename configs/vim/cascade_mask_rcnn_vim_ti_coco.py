# The released recipe at 1024x1024. Start from ImageNet weights with
#   --cfg-options model.backbone.init_cfg.type=Pretrained model.backbone.init_cfg.checkpoint=FILE
_base_ = [
    '../_base_/models/cascade-mask-rcnn_vim.py',
    '../_base_/datasets/coco_instance_lsj.py',
    '../_base_/schedules/adamw_184k.py',
    '../_base_/default_runtime.py',
]

model = dict(
    # With no side above it, every image is padded to the whole frame, with zeros behind the normalisation.
    data_preprocessor=dict(pad_size_divisor=_base_.image_size[0]),
    backbone=dict(img_size=_base_.image_size),
)
optim_wrapper = dict(paramwise_cfg=dict(decay_rate=0.837))
