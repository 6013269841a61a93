_base_ = './mask-rcnn_mambavision-t_fpn_folder.py'  # the former name
