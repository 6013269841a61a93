# Mask R-CNN on a plain backbone as in ViTDet: the cascade's parts with one stage and boxes of each class.
_base_ = './cascade-mask-rcnn_vim.py'

model = dict(
    type='MaskRCNN',
    roi_head=dict(
        _delete_=True,
        type='StandardRoIHead',
        bbox_roi_extractor=_base_.model.roi_head.bbox_roi_extractor,
        bbox_head=dict(
            _base_.model.roi_head.bbox_head,
            num_classes=80,
            reg_class_agnostic=False,
            bbox_coder=dict(
                type='DeltaXYWHBBoxCoder', target_means=[0.0, 0.0, 0.0, 0.0], target_stds=[0.1, 0.1, 0.2, 0.2]
            ),
        ),
        mask_roi_extractor=_base_.model.roi_head.mask_roi_extractor,
        mask_head=dict(_base_.model.roi_head.mask_head, num_classes=80),
    ),
    train_cfg=dict(rcnn=dict(assigner=dict(pos_iou_thr=0.5, neg_iou_thr=0.5, min_pos_iou=0.5))),
)
