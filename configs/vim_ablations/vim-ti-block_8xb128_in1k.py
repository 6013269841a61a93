# Bidirectional block: blocks in pairs, the second of each backwards.
_base_ = './vim-ti-cls-mean_8xb128_in1k.py'

model = dict(backbone=dict(directions='block'))
