# Segmenter with a decoder of two layers behind the last block's normalised output; bidirectional SSM and convolution.
# Start from the ImageNet weights of the same strategy with
#   --cfg-options model.backbone.init_cfg.type=Pretrained model.backbone.init_cfg.checkpoint=FILE
_base_ = [
    'mmseg::_base_/models/segmenter_vit-b16_mask.py',
    'mmseg::_base_/datasets/ade20k.py',
    '../_base_/schedules/adamw_160k_ade20k.py',
    'mmseg::_base_/default_runtime.py',
]
runner_type = 'mmvim.Runner'

embed_dims = 192
model = dict(
    data_preprocessor=dict(size=(512, 512), mean=[123.675, 116.28, 103.53], std=[58.395, 57.12, 57.375]),
    pretrained=None,
    backbone=dict(
        _delete_=True,
        type='mmvim.VisionMamba',
        arch='tiny',
        img_size=512,
        cls_token=None,
        out_type='featmap',
        feature_source='residual',
        final_norm=True,
    ),
    decode_head=dict(in_channels=embed_dims, channels=embed_dims, embed_dims=embed_dims, num_heads=3),
)
train_dataloader = dict(batch_size=2)
