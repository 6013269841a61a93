# Control of the demo: the same run without the Vim blocks. Patch embedding and positions go straight to the pyramid.
_base_ = './cascade_mask_rcnn_vim_ti_shapes.py'

model = dict(backbone=dict(arch=dict(depth=0)))
