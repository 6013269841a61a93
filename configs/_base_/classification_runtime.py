# Training counted in iterations.
_base_ = 'mmpretrain::_base_/default_runtime.py'
runner_type = 'mmvim.Runner'

default_hooks = dict(
    logger=dict(interval=10, log_metric_by_epoch=False),
    checkpoint=dict(by_epoch=False, interval=1000),
)
log_processor = dict(by_epoch=False)
