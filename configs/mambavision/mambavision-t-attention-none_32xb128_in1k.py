# Ablation: no attention.
_base_ = './mambavision-t_32xb128_in1k.py'

model = dict(backbone=dict(attention='none'))
