# Bidirectional sequence: in training, each batch is scanned backwards with probability 1/2.
_base_ = './vim-ti-cls-mean_8xb128_in1k.py'

model = dict(backbone=dict(directions='sequence'))
