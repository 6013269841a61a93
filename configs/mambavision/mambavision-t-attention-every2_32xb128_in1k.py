# Ablation: every second block of levels 2 and 3 is attention.
_base_ = './mambavision-t_32xb128_in1k.py'

model = dict(backbone=dict(attention=2))
