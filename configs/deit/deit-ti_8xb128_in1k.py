# Vim's data and schedule, which are DeiT's.
_base_ = '../vim/vim-ti_8xb128_in1k.py'

model = dict(backbone=dict(_delete_=True, type='mmvim.VisionTransformer', arch='deit-tiny', drop_path_rate=0.1))
optim_wrapper = dict(optimizer=dict(weight_decay=0.05))
