_base_ = './vim-ti_8xb128_in1k.py'

model = dict(backbone=dict(arch='small', drop_path_rate=0.05), head=dict(in_channels=384))
optim_wrapper = dict(optimizer=dict(weight_decay=0.05))
