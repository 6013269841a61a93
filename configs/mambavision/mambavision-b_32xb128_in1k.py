_base_ = './mambavision-t_32xb128_in1k.py'

embed_dims = 128
model = dict(backbone=dict(arch='base', drop_path_rate=0.3), head=dict(in_channels=8 * embed_dims))
