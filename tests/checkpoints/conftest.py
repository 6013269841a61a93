import argparse
import json
from pathlib import Path

import pytest
import torch

KEYS = json.loads((Path(__file__).parents[1] / 'data' / 'vim_tiny_keys.json').read_text())
MODEL = 'vim_{}_patch16_224_bimambav2_final_pool_mean_abs_pos_embed_with_midclstok_div2'


@pytest.fixture
def published_vim(tmp_path):
    """Write a file with the names, shapes and `args` of a published Vim classifier; returns its path."""

    def write(size='tiny', model=MODEL, rotary=False):
        factor = dict(tiny=1, small=2)[size]
        weights = {}
        for name, shape in KEYS.items():
            if 'dt_proj' in name and len(shape) == 2:  # (E, R)
                shape = [n * factor for n in shape]
            elif 'x_proj' in name:  # (R + 2N, E)
                shape = [(shape[0] - 32) * factor + 32, shape[1] * factor]
            else:
                shape = [n * factor if n in (192, 384, 768) else n for n in shape]
            for i in range(24 if name.startswith('layers.0.') else 1):
                weights[name.replace('layers.0.', f'layers.{i}.')] = torch.full(shape, 0.01)
        if rotary:
            weights |= {f'rope.freqs_{part}': torch.ones(196, 192 * factor) for part in ('cos', 'sin')}
        path = tmp_path / f'vim_{size}.pth'
        args = argparse.Namespace(lr=1e-3) if model is None else argparse.Namespace(lr=1e-3, model=model.format(size))
        torch.save({'model': weights, 'epoch': 299, 'args': args}, path)
        return path

    return write
