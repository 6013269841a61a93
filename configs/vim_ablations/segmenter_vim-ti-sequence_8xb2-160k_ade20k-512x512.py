# Bidirectional sequence: in training, each batch is scanned backwards with probability 1/2.
_base_ = './segmenter_vim-ti_8xb2-160k_ade20k-512x512.py'

model = dict(backbone=dict(directions='sequence'))
