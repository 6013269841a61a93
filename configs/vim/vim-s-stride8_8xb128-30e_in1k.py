# Long-sequence fine-tuning: patches of 16 pixels, 8 apart. Start from the classifier, head included, with
#   --cfg-options load_from=FILE
_base_ = './vim-s_8xb128_in1k.py'

model = dict(backbone=dict(patch_stride=8, drop_path_rate=0.0))
train_cfg = dict(max_epochs=30)
optim_wrapper = dict(optimizer=dict(lr=1e-5, weight_decay=1e-8))
param_scheduler = None
