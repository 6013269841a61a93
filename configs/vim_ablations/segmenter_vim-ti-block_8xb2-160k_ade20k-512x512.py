# Bidirectional block: blocks in pairs, the second of each backwards.
_base_ = './segmenter_vim-ti_8xb2-160k_ade20k-512x512.py'

model = dict(backbone=dict(directions='block'))
