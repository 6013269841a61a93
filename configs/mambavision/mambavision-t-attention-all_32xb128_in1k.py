# Ablation: attention only, no scan.
_base_ = './mambavision-t_32xb128_in1k.py'

model = dict(backbone=dict(attention='all'))
