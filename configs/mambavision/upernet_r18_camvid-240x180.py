# Control: ResNet-18 in place of MambaVision, for about the same time.
_base_ = './upernet_mambavision-t_camvid-240x180.py'

model = dict(
    backbone=dict(_delete_=True, type='ResNetV1c', depth=18, norm_cfg=dict(type='BN')),
    decode_head=dict(in_channels=[64, 128, 256, 512]),
    auxiliary_head=dict(in_channels=256),
)
max_iters = 1800
