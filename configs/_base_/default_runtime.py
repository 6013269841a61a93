default_scope = 'mmdet'
runner_type = 'mmvim.Runner'

default_hooks = dict(
    logger=dict(type='LoggerHook', interval=50),
    checkpoint=dict(type='CheckpointHook', by_epoch=False, interval=5000, max_keep_ckpts=3),
    visualization=dict(type='DetVisualizationHook'),
)
log_processor = dict(type='LogProcessor', by_epoch=False)
visualizer = dict(type='mmvim.EnlargingDetVisualizer', vis_backends=[dict(type='LocalVisBackend')], name='visualizer')
env_cfg = dict(mp_cfg=dict(mp_start_method='fork', opencv_num_threads=0), dist_cfg=dict(backend='nccl'))
