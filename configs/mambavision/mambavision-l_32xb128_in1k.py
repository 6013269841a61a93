_base_ = './mambavision-t_32xb128_in1k.py'

embed_dims = 196
model = dict(backbone=dict(arch='large', drop_path_rate=0.3), head=dict(in_channels=8 * embed_dims))
