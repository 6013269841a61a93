_base_ = './cascade_mask_rcnn_vim_ti_folder.py'  # the former name
