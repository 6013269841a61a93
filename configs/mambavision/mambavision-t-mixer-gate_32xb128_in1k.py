# Ablation: convolutions in both branches, which are multiplied and not concatenated.
_base_ = './mambavision-t_32xb128_in1k.py'

model = dict(backbone=dict(mixer_merge='gate'))
