_base_ = './mask-rcnn_hier-vim-t_fpn_1x_coco.py'

model = dict(backbone=dict(arch='small'))
