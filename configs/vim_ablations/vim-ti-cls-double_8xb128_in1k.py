# Two class tokens, one at each end; classification by their mean.
_base_ = '../vim/vim-ti_8xb128_in1k.py'

model = dict(backbone=dict(cls_token='double'))
