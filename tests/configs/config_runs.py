"""What the tests of configs share: models at a reduced size, samples, a step, and a published classifier's test."""

import copy
import pickle
from pathlib import Path

import cv2
import numpy as np
import pytest
import torch
from mmcv.cnn.bricks import DropPath
from mmengine.optim import build_optim_wrapper
from mmengine.registry import MODELS
from mmengine.structures import InstanceData, PixelData
from torch import nn

from mmvim.models import HierVim, MambaVision, VisionMamba, VisionTransformer
from mmvim.tools import command_line, test

CONFIGS = Path(__file__).parents[2] / 'configs'
FORMER = {  # names that configs had before, which still work
    'hier_vim/mask-rcnn_hier-vim-t_fpn_coco-folder.py': 'hier_vim/mask-rcnn_hier-vim-t_fpn_folder.py',
    'mambavision/mask-rcnn_mambavision-t_fpn_coco-folder.py': 'mambavision/mask-rcnn_mambavision-t_fpn_folder.py',
    'vim/cascade_mask_rcnn_vim_ti_coco_folder.py': 'vim/cascade_mask_rcnn_vim_ti_folder.py',
}
FILES = {str(path.relative_to(CONFIGS)) for path in CONFIGS.rglob('*.py') if '_base_' not in path.parts}
NAMES = sorted(FILES - FORMER.keys())
WIDTH = 16
SMALL = {
    VisionMamba: dict(embed_dims=WIDTH, depth=4, d_state=4),
    VisionTransformer: dict(embed_dims=WIDTH, depth=4, num_heads=2),
    HierVim: dict(embed_dims=WIDTH, depths=(1, 1, 2, 1)),
    MambaVision: dict(embed_dims=WIDTH, stem_channels=8, depths=(1, 1, 3, 2), num_heads=(1, 2, 4, 8)),
}


def rates(cfg):
    """Learning rate and weight decay of every parameter, by name."""
    with torch.device('meta'):
        model = MODELS.build(cfg.model)
    groups = build_optim_wrapper(model, cfg.optim_wrapper).optimizer.param_groups
    names = {id(parameter): name for name, parameter in model.named_parameters()}
    return {names[id(p)]: (g['lr'], g['weight_decay']) for g in groups for p in g['params']}


def reduced(cfg, size):
    """The model's config with a small backbone and small heads; label maps are cropped to a size."""
    model = copy.deepcopy(cfg.model)
    if cfg.default_scope == 'mmseg':
        model.data_preprocessor.size = size
    kind = MODELS.get(model.backbone.type)
    if kind not in SMALL:  # a control with a backbone of the host
        return model
    channels = [WIDTH * 2**i for i in range(4)] if kind in (HierVim, MambaVision) else [WIDTH] * 4
    _reduce_backbone(model.backbone, kind)
    if cfg.default_scope == 'mmdet':
        _reduce_detector(model, channels if isinstance(model.neck.in_channels, list) else WIDTH)
    elif cfg.default_scope == 'mmpretrain':
        model.head.in_channels = channels[3]
    elif 'Segmenter' in model.decode_head.type:
        model.decode_head.update(in_channels=WIDTH, channels=WIDTH, embed_dims=WIDTH, num_heads=2)
        model.test_cfg.update(crop_size=(48, 48), stride=(32, 32))
    else:
        if 'neck' in model:
            model.neck.embed_dim = WIDTH
        model.decode_head.update(in_channels=channels, channels=WIDTH)
        model.auxiliary_head.update(in_channels=channels[2], channels=WIDTH)
    return model


def _reduce_backbone(backbone, kind):
    arch = dict(SMALL[kind])
    if kind is MambaVision:
        given = backbone.arch
        arch['layer_scale'] = MambaVision.arch_zoo[given].get('layer_scale') if isinstance(given, str) else None
        backbone.window_sizes = (8, 8, 5, 3)
    elif not isinstance(backbone.arch, str):
        arch['depth'] = min(arch['depth'], backbone.arch.depth)
    if kind is VisionTransformer and backbone.get('window_size'):
        backbone.update(window_size=3, global_attn_indexes=(1, 3))
    if kind in (VisionMamba, VisionTransformer) and len(backbone.get('out_indices', ())) == 4:
        backbone.out_indices = (0, 1, 2, 3)
    backbone.arch = arch


def _reduce_detector(model, channels):
    model.data_preprocessor.pad_size_divisor = 32  # not the whole frame
    model.neck.update(in_channels=channels, out_channels=WIDTH)
    model.rpn_head.update(in_channels=WIDTH, feat_channels=WIDTH)
    roi_head = model.roi_head
    for head in roi_head.bbox_head if isinstance(roi_head.bbox_head, list) else [roi_head.bbox_head]:
        head.update(in_channels=WIDTH, conv_out_channels=WIDTH, fc_out_channels=32)
    roi_head.mask_head.update(in_channels=WIDTH, conv_out_channels=WIDTH)
    for extractor in (roi_head.bbox_roi_extractor, roi_head.mask_roi_extractor):
        extractor.out_channels = WIDTH


def samples(scope, sizes):
    """Images of these sizes (height, width) and their truth, as the host's pipeline packs them."""
    torch.manual_seed(0)
    inputs = [torch.randint(0, 256, (3, *size), dtype=torch.uint8) for size in sizes]
    data = []
    for i, (h, w) in enumerate(sizes):
        meta = dict(img_shape=(h, w), ori_shape=(h, w), pad_shape=(h, w), scale_factor=(1.0, 1.0))
        if scope == 'mmdet':
            from mmdet.structures import DetDataSample
            from mmdet.structures.mask import BitmapMasks

            sample = DetDataSample(metainfo=meta)
            mask = np.zeros((1, h, w), np.uint8)
            mask[0, h // 4 : h // 2, w // 4 : 3 * w // 4] = 1
            sample.gt_instances = InstanceData(
                bboxes=torch.tensor([[w / 4, h / 4, 3 * w / 4, h / 2]]),
                labels=torch.tensor([i % 2]),
                masks=BitmapMasks(mask, h, w),
            )
        elif scope == 'mmseg':
            from mmseg.structures import SegDataSample

            sample = SegDataSample(metainfo=meta)
            sample.gt_sem_seg = PixelData(data=torch.randint(0, 3, (1, h, w)))
        else:
            from mmpretrain.structures import DataSample

            sample = DataSample(metainfo=meta).set_gt_label(i % 2)
        data.append(sample)
    return dict(inputs=inputs, data_samples=data)


def train_and_predict(cfg, model, sizes):
    """One step by the config's optimiser, and a prediction of the first image; returns the parameters that stayed.

    Not among them are biases of queries, keys and values: no shift before a softmax over keys has an effect.
    """
    scope = cfg.default_scope
    for module in model.modules():
        if isinstance(module, DropPath):
            module.drop_prob = 0.0  # else whole blocks may get no gradient from so few images
    if cfg.optim_wrapper.get('dtype') == 'float16':
        cfg.optim_wrapper.loss_scale = 1.0  # the first steps of dynamic scaling are skipped
    wrapper = build_optim_wrapper(model, cfg.optim_wrapper)
    before = {name: parameter.detach().clone() for name, parameter in model.named_parameters()}
    log = model.train().train_step(samples(scope, sizes), wrapper)
    assert log and all(torch.isfinite(value).all() for value in log.values())
    stayed = [name for name, parameter in model.named_parameters() if torch.equal(parameter, before[name])]
    with torch.no_grad():
        (predicted,) = model.eval().test_step(samples(scope, sizes[:1]))
    if scope == 'mmdet':
        assert predicted.pred_instances.masks.shape == (len(predicted.pred_instances.bboxes), *sizes[0])
    elif scope == 'mmseg':
        assert predicted.pred_sem_seg.data.shape == (1, *sizes[0])
    else:
        assert predicted.pred_score.sum() == pytest.approx(1)
    return [name for name in stayed if not name.endswith('qkv.bias')]


PUBLISHED_CLASSIFIER = """
_base_ = '{config}'

model = dict(
    backbone={backbone},
    head=dict(num_classes=4, in_channels={channels}),
    train_cfg=None,
)
test_pipeline = [dict(type='LoadImageFromFile'), dict(type='PackInputs')]
test_dataloader = dict(
    batch_size=4,
    num_workers=0,
    dataset=dict(
        _delete_=True, type='CustomDataset', data_root='images', pipeline=test_pipeline, classes=['a', 'b', 'c', 'd']
    ),
)
test_evaluator = dict(topk=1)
train_dataloader = val_dataloader = train_cfg = val_cfg = val_evaluator = optim_wrapper = param_scheduler = None
"""


def check_published_classifier(folder, config, backbone, settings, save):
    """tools/test.py with a published file itself: its scores are those of backbone and head computed by hand.

    Args:
        folder: where the tool runs, and which is the current directory.
        config: path below configs.
        backbone: a small backbone; its parameters are drawn.
        settings: arguments of the config's backbone that make it the same.
        save: function (state dict with the published names, path) that writes the file.
    """
    torch.manual_seed(0)
    (channels,) = backbone.out_channels
    backbone, head = backbone.eval(), nn.Linear(channels, 4)
    for parameter in backbone.parameters():
        nn.init.normal_(parameter, std=0.2)
    weights = {**backbone.state_dict(), **{f'head.{name}': value for name, value in head.state_dict().items()}}
    save(weights, folder / 'published.pth')

    images = np.random.default_rng(0).integers(0, 256, (6, 64, 48, 3), dtype=np.uint8)
    for i, image in enumerate(images):
        (folder / 'images' / 'abcd'[i % 4]).mkdir(parents=True, exist_ok=True)
        cv2.imwrite(str(folder / 'images' / 'abcd'[i % 4] / f'{i}.png'), image[..., ::-1])
    text = PUBLISHED_CLASSIFIER.format(config=CONFIGS / config, backbone=settings, channels=channels)
    (folder / 'c.py').write_text(text)
    arguments = ['c.py', 'published.pth', '--work-dir', 'work', '--out', 'out.pkl']
    command_line.run(test, arguments)

    mean, std = np.float32([123.675, 116.28, 103.53]), np.float32([58.395, 57.12, 57.375])
    with torch.no_grad():
        x = torch.from_numpy((images.astype(np.float32) - mean) / std).permute(0, 3, 1, 2)
        expected = head(backbone(x)[0]).softmax(1)
    assert expected.std() > 0.01
    predictions = {int(Path(p['img_path']).stem): p for p in pickle.loads((folder / 'out.pkl').read_bytes())}
    assert sorted(predictions) == list(range(6))
    for i, prediction in predictions.items():
        torch.testing.assert_close(prediction['pred_score'], expected[i], rtol=1e-4, atol=1e-5)
        assert prediction['gt_label'].item() == i % 4
