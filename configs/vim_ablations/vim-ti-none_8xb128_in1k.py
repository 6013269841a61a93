# One direction: Mamba as it is.
_base_ = './vim-ti-cls-mean_8xb128_in1k.py'

model = dict(backbone=dict(directions='none'))
