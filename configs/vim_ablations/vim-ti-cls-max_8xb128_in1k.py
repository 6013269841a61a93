# Classification of every token, and the largest score of each class.
_base_ = '../vim/vim-ti_8xb128_in1k.py'

model = dict(backbone=dict(cls_token=None, out_type='raw'), head=dict(type='mmvim.TokenMaxClsHead'))
