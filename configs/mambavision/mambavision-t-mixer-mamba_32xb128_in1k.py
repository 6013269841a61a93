# Ablation: the mixer as in Mamba, with a causal convolution, and a gate that has none.
_base_ = './mambavision-t_32xb128_in1k.py'

model = dict(backbone=dict(mixer_conv='causal', mixer_symmetric=False, mixer_merge='gate'))
