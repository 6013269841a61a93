# Ablation: attention in the middle of levels 2 and 3.
_base_ = './mambavision-t_32xb128_in1k.py'

model = dict(backbone=dict(attention='middle'))
