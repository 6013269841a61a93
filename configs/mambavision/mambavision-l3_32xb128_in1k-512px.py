_base_ = './mambavision-l2_32xb128_in1k-512px.py'

embed_dims = 256
model = dict(backbone=dict(arch='large3'), head=dict(in_channels=8 * embed_dims))
