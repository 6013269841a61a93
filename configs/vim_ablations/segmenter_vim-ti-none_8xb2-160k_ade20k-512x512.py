# One direction: Mamba as it is.
_base_ = './segmenter_vim-ti_8xb2-160k_ade20k-512x512.py'

model = dict(backbone=dict(directions='none'))
