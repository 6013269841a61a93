_base_ = './mask-rcnn_hier-vim-t_fpn_folder.py'  # the former name
