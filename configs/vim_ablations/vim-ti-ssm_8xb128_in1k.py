# Bidirectional SSM without a convolution of its own in the second direction.
_base_ = './vim-ti-cls-mean_8xb128_in1k.py'

model = dict(backbone=dict(directions='v1'))
