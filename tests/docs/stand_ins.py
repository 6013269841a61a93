"""What a page on trained models needs, below the current folder: a photo, and small models with random weights.

Of the models, those whose work directory stands in the text on standard input.
"""

import sys
from pathlib import Path

import cv2
import numpy as np
import torch
from mmengine.config import Config
from mmengine.registry import MODELS, DefaultScope

import mmvim  # noqa: F401

CONFIGS = Path(__file__).parents[2] / 'configs'
SMALL = dict(embed_dims=16, depth=4)
# work directory and checkpoint that a page names -> a shipped config and what makes it small
TRAINED = {
    'cascade_mask_rcnn_vim_ti_shapes/iter_800.pth': ('demo/cascade_mask_rcnn_vim_ti_shapes.py', {}),
    'upernet_vim-ti_folder/iter_5000.pth': (
        'vim/upernet_vim-ti_8xb4-60k_ade20k-512x512.py',
        {
            'model.backbone.out_indices': (0, 1, 2, 3),
            'model.neck.embed_dim': 16,
            'model.decode_head.in_channels': [16] * 4,
            'model.decode_head.channels': 16,
            'model.auxiliary_head.in_channels': 16,
            'model.auxiliary_head.channels': 16,
        },
    ),
    'flowers/iter_3000.pth': ('vim/vim-ti_8xb128_in1k.py', {'model.head.in_channels': 16, 'model.head.num_classes': 2}),
}


def main() -> None:
    rng = np.random.default_rng(0)
    cv2.imwrite('photo.jpg', rng.integers(0, 256, (64, 96, 3), np.uint8))
    text = sys.stdin.read()
    for file, (config, options) in TRAINED.items():
        if file.partition('/')[0] not in text:
            continue
        cfg = Config.fromfile(CONFIGS / config)
        cfg.merge_from_dict(options)
        if 'demo' not in config:
            cfg.model.backbone.arch = SMALL
        checkpoint = Path('work_dirs', file)
        checkpoint.parent.mkdir(parents=True)
        with DefaultScope.overwrite_default_scope(cfg.default_scope):
            model = MODELS.build(cfg.model)
        cfg.dump(checkpoint.parent / f'{checkpoint.parent.name}.py')
        classes = [f'class {i}' for i in range(150 if 'upernet' in config else 4 if 'demo' in config else 2)]
        meta = dict(dataset_meta=dict(classes=classes, palette=[[i, 0, 0] for i in range(len(classes))]))
        torch.save(dict(state_dict=model.state_dict(), meta=meta), checkpoint)


if __name__ == '__main__':
    main()
