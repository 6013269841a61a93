# Class token at the head of the sequence.
_base_ = '../vim/vim-ti_8xb128_in1k.py'

model = dict(backbone=dict(cls_token='head'))
