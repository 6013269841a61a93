# Ablation: a regular convolution; a gate that has none.
_base_ = './mambavision-t_32xb128_in1k.py'

model = dict(backbone=dict(mixer_symmetric=False, mixer_merge='gate'))
