# The paper's setting. Start from ImageNet weights with
#   --cfg-options model.backbone.init_cfg.type=Pretrained model.backbone.init_cfg.checkpoint=FILE
_base_ = [
    '../_base_/models/upernet_vim.py',
    'mmseg::_base_/datasets/ade20k.py',
    '../_base_/schedules/adamw_160k_ade20k.py',
    'mmseg::_base_/default_runtime.py',
]
runner_type = 'mmvim.Runner'

model = dict(backbone=dict(drop_path_rate=0.1))
train_dataloader = dict(batch_size=2)
