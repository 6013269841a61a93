# Bidirectional SSM without a convolution of its own in the second direction.
_base_ = './segmenter_vim-ti_8xb2-160k_ade20k-512x512.py'

model = dict(backbone=dict(directions='v1'))
