"""Models in float64, as checks of gradients want them, agree with themselves in float32."""

import pytest
import torch

from mmvim.models import HierVim, MambaVision, VisionMamba, VisionTransformer

MODELS = {
    'vim': lambda: VisionMamba(dict(embed_dims=16, depth=2), img_size=64, out_type='featmap'),
    'vim v1': lambda: VisionMamba(dict(embed_dims=16, depth=1), img_size=64, directions='v1', out_type='featmap'),
    'deit': lambda: VisionTransformer(dict(embed_dims=16, depth=1, num_heads=2), img_size=64, out_type='featmap'),
    'mambavision': lambda: MambaVision(
        dict(embed_dims=8, stem_channels=8, depths=(1, 1, 2, 2), num_heads=(1, 2, 2, 2)), window_sizes=(8, 8, 4, 2)
    ),
    'hier_vim': lambda: HierVim(dict(embed_dims=8, depths=(1, 1, 1, 1))),
}


@pytest.mark.parametrize('name', MODELS)
def test_float64(name):
    torch.manual_seed(0)
    model = MODELS[name]().eval()
    x = torch.randn(1, 3, 48, 64)
    maps = model(x)
    for narrow, wide in zip(maps, model.double()(x.double()), strict=True):
        assert wide.dtype == torch.float64
        torch.testing.assert_close(narrow.double(), wide, rtol=1e-3, atol=1e-4)
