_base_ = './upernet_hier-vim-t_8xb2-160k_ade20k-512x512.py'

model = dict(backbone=dict(arch='small'))
