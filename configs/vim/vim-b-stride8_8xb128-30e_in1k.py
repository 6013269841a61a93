_base_ = './vim-s-stride8_8xb128-30e_in1k.py'

model = dict(backbone=dict(arch='base'), head=dict(in_channels=768))
