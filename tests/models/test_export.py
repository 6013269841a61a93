"""Every backbone exported once runs at any batch and image size, as the eager model does."""

import subprocess
import sys

import pytest
import torch

from mmvim.models import HierVim, MambaVision, VisionMamba, VisionTransformer

VIM = dict(embed_dims=16, depth=2)
DEIT = dict(embed_dims=16, depth=2, num_heads=2)
HIER_VIM = dict(embed_dims=8, depths=(1, 1, 1, 1))
MAMBAVISION = dict(embed_dims=16, stem_channels=8, depths=(1, 1, 2, 2), num_heads=(1, 2, 2, 4))
LEVELS = (8, 8, 4, 3)


def vim(**settings):
    return VisionMamba(VIM, img_size=64, **settings)


def deit(**settings):
    return VisionTransformer(DEIT, img_size=64, **settings)


def mambavision(**settings):
    return MambaVision(MAMBAVISION, window_sizes=LEVELS, **settings)


CASES = {
    'vim-middle': lambda: vim(),
    'vim-head-rotary': lambda: vim(cls_token='head', out_type='featmap', rotary='both'),
    'vim-double': lambda: vim(cls_token='double'),
    'vim-dense': lambda: vim(cls_token=None, out_type='featmap', rotary='both', out_indices=(0, 1)),
    'deit-token': lambda: deit(),
    'deit-windows': lambda: deit(with_cls_token=False, out_type='featmap', window_size=4, global_attn_indexes=(1,)),
    'hier-vim': lambda: HierVim(HIER_VIM),
    'mambavision': lambda: mambavision(),
}
MORE = {
    **{
        f'vim-{layout}-{out_type}': lambda layout=layout, out_type=out_type: vim(cls_token=layout, out_type=out_type)
        for layout in VisionMamba.CLS_TOKENS
        for out_type in VisionMamba.OUT_TYPES
        if layout or out_type != 'cls_token'
    },
    **{
        f'vim-rotary-{layout}': lambda layout=layout: vim(cls_token=layout, out_type='featmap', rotary='hidden')
        for layout in VisionMamba.CLS_TOKENS
    },
    **{
        f'vim-{directions}': lambda directions=directions: vim(directions=directions)
        for directions in VisionMamba.DIRECTIONS
    },
    'vim-stride8': lambda: vim(patch_stride=8, out_type='featmap'),
    **{
        f'deit-{out_type}': lambda out_type=out_type: deit(out_type=out_type)
        for out_type in VisionTransformer.OUT_TYPES
    },
    'deit-dense': lambda: deit(with_cls_token=False, out_type='featmap'),
    'deit-materialized': lambda: deit(attention='materialized'),
    'hier-vim-classifier': lambda: HierVim(HIER_VIM, out_type='avg_featmap'),
    'mambavision-classifier': lambda: mambavision(out_type='avg_featmap'),
    'mambavision-fitted': lambda: mambavision(fit_windows=True),
}
# from one window to several, padded and not, and more tokens than a chunk of the scan; the first is the size of the
# position table
SIZES = ((1, 64, 64), (3, 96, 160), (2, 192, 96))


@pytest.mark.parametrize(
    'case',
    [*CASES, *(pytest.param(case, marks=pytest.mark.slow) for case in MORE)],  # python -m pytest tests/models -m slow
)
def test_free_batch_height_and_width(case):
    torch.manual_seed(0)
    model = (CASES | MORE)[case]().eval()
    stride = 8 if case == 'vim-stride8' else 32 if case.startswith(('hier', 'mambavision')) else 16
    batch, rows, columns = (torch.export.Dim(name, min=low, max=64) for name, low in (('n', 1), ('h', 2), ('w', 2)))
    example = torch.randn(2, 3, 128, 96)
    with torch.set_grad_enabled(case in CASES):  # with gradients the scan keeps states as well
        program = torch.export.export(
            model, (example,), dynamic_shapes=({0: batch, 2: stride * rows, 3: stride * columns},)
        )
    with torch.no_grad():
        exported = program.module()
        for size in SIZES:
            image = torch.randn(size[0], 3, *size[1:])
            for ours, want in zip(exported(image), model(image), strict=True):
                torch.testing.assert_close(ours, want, rtol=1e-4, atol=1e-5)


@pytest.mark.filterwarnings('ignore::torch.jit.TracerWarning')
@pytest.mark.parametrize('case', CASES)
def test_a_trace_leaves_the_batch_free(case):
    """torch.jit.trace keeps the image size; sizes are tensors while it runs."""
    torch.manual_seed(0)
    model = CASES[case]().eval()
    with torch.no_grad():
        for size in ((64, 64), (96, 64)):
            traced = torch.jit.trace(model, torch.randn(2, 3, *size), check_trace=False)
            image = torch.randn(3, 3, *size)
            for ours, want in zip(traced(image), model(image), strict=True):
                torch.testing.assert_close(ours, want, rtol=1e-4, atol=1e-5)


def test_a_model_that_never_ran():
    """Nothing is left to import in the midst of the export, where PyTorch 2.10 has replaced what Numba looks for."""
    code = (
        'import torch; from mmvim.models import VisionMamba;'
        "model = VisionMamba(dict(embed_dims=16, depth=1), img_size=32, cls_token=None, out_type='featmap').eval();"
        'torch.no_grad().__enter__(); torch.export.export(model, (torch.zeros(1, 3, 32, 32),))'
    )
    result = subprocess.run([sys.executable, '-c', code], capture_output=True, text=True, timeout=300)
    assert result.returncode == 0, result.stderr
