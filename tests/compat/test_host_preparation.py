"""What `import mmvim` changes for the hosts, each in an interpreter of its own."""

import json
import sys
from pathlib import Path

import mmcv
import pytest


def test_importing_mmvim_is_light(run_python):
    out = run_python(
        """
import json, sys
import mmvim
heavy = 'mmcv', 'mmdet', 'mmseg', 'mmpretrain', 'torchvision', 'cv2', 'triton', 'numba'
print(json.dumps([name for name in heavy if name in sys.modules]))
""",
        python=sys.executable,
    )
    assert json.loads(out) == []


def test_the_backbones_need_no_host(run_python):
    out = run_python(
        """
import sys
for name in 'mmdet', 'mmseg', 'mmpretrain', 'numba':
    sys.modules[name] = None
import mmvim
from mmvim.registry import MODELS
print(MODELS.get('mmvim.VisionMamba'))
"""
    )
    assert 'mmvim.models.backbones.vim.model.VisionMamba' in out


def test_the_stand_in_is_a_module_like_any_other(run_python):
    out = run_python(
        """
import mmvim
from importlib.util import find_spec
assert find_spec('mmcv._ext') is not None
import mmcv._ext as first
assert find_spec('mmcv._ext') is first.__spec__
from mmengine.utils.dl_utils import mmcv_full_available
assert mmcv_full_available()
assert not hasattr(first, '__path__')
import mmvim.compat
mmvim.compat.install()
import sys
assert sum(type(finder).__name__ == 'TorchvisionOpsFinder' for finder in sys.meta_path) == 1
from mmcv.utils import collect_env
print(collect_env()['MMCV Compiler'])
"""
    )
    assert 'no compiled ops' in out


@pytest.mark.parametrize('order', ['compiled', 'none'])
def test_compiled_ops_win_where_present(run_python, tmp_path, order):
    package = tmp_path / 'overlay' / 'mmcv'
    package.mkdir(parents=True)
    for entry in Path(mmcv.__file__).parent.iterdir():
        if entry.name != '__pycache__' and not entry.name.startswith('_ext'):
            (package / entry.name).symlink_to(entry)
    if order == 'compiled':
        (package / '_ext.py').write_text(
            "def __getattr__(name):\n    return lambda *args, **kwargs: f'compiled {name}'\n"
        )
    out = run_python(
        f"""
import sys
sys.path.insert(0, {str(package.parent)!r})
import mmvim, mmcv.ops, torch
module = sys.modules['mmcv.ops.nms'].ext_module
print(module.nms(torch.zeros(0, 4), torch.zeros(0), iou_threshold=0.5, offset=0))
"""
    )
    assert ('compiled nms' in out) == (order == 'compiled')


def test_hosts_imported_before_mmvim_are_repaired(run_python):
    run_python(
        """
import mmseg.models.utils.point_sample as point_sample
import mmdet.structures.mask.structures as structures
try:
    import mmdet.models
except ImportError:
    pass
else:
    raise SystemExit(0)  # this mmcv has compiled ops: nothing to repair
assert point_sample.point_sample is None

import mmvim
import mmcv.ops
assert point_sample.point_sample is mmcv.ops.point_sample
assert structures.roi_align is mmcv.ops.roi_align
import torch
masks = structures.BitmapMasks([torch.ones(8, 8).numpy()], 8, 8)
import numpy as np
assert masks.crop_and_resize(np.array([[0, 0, 4, 4.0]]), (3, 3), np.array([0])).masks.all()

import mmdet.models
from mmdet.registry import MODELS
extractor = MODELS.build(dict(
    type='SingleRoIExtractor', roi_layer=dict(type='RoIAlign', output_size=3), out_channels=1, featmap_strides=[4]))
assert extractor([torch.ones(1, 1, 8, 8)], torch.tensor([[0, 4, 4, 16, 16.0]])).eq(1).all()
"""
    )


def test_custom_imports_come_early_enough_for_mmdets_own_tools(run_python, tmp_path):
    (tmp_path / 'config.py').write_text(
        """
custom_imports = dict(imports=['mmvim'])
model = dict(
    type='RPN',
    backbone=dict(type='mmvim.VisionMamba', arch=dict(embed_dims=16, depth=1), cls_token=None, out_type='featmap'),
    neck=None,
    train_cfg=None,
    rpn_head=dict(type='RPNHead', in_channels=16, feat_channels=16, anchor_generator=dict(
        type='AnchorGenerator', scales=[8], ratios=[1.0], strides=[16])),
    test_cfg=dict(rpn=dict(nms_pre=9, max_per_img=9, nms=dict(type='nms', iou_threshold=0.7), min_bbox_size=0)))
"""
    )
    run_python(
        """
from mmdet.utils import setup_cache_size_limit_of_dynamo  # what tools/train.py of mmdet imports first
from mmengine.config import Config
config = Config.fromfile('config.py')
from mmdet.utils import register_all_modules
from mmdet.registry import MODELS
register_all_modules()
import torch
from mmdet.structures import DetDataSample
model = MODELS.build(config.model).eval()
sample = DetDataSample(metainfo=dict(img_shape=(64, 64), scale_factor=(1, 1)))
assert len(model.predict(torch.randn(1, 3, 64, 64), [sample])[0].pred_instances)
"""
    )


HOST_BASES = {
    'mmdet': 'mmdet::_base_/models/cascade-mask-rcnn_r50_fpn.py',
    'mmseg': 'mmseg::_base_/models/upernet_r50.py',
    'mmpretrain': 'mmpretrain::_base_/models/resnet50.py',
}


def test_base_configs_of_every_host_resolve(run_python, tmp_path):
    for name, base in HOST_BASES.items():
        (tmp_path / f'from_{name}.py').write_text(f'_base_ = {base!r}\n')
    out = run_python(
        """
import json, sys
import mmvim
from mmengine.config import Config
loaded = [name for name in ('mmdet', 'mmseg', 'mmpretrain') if 'model' in Config.fromfile(f'from_{name}.py')]
print(json.dumps(loaded))
"""
    )
    assert json.loads(out.splitlines()[-1]) == list(HOST_BASES)


def test_missing_and_old_hosts_are_named_together(monkeypatch):
    import mmdet

    from mmvim.compat import require

    require('mmengine', 'mmcv', 'mmdet', 'mmseg', 'mmpretrain')
    monkeypatch.setattr(mmdet, '__version__', '2.28.0')
    monkeypatch.setitem(__import__('sys').modules, 'mmseg', None)
    with pytest.raises(ImportError, match=r'mmseg is not installed; mmdet is 2\.28\.0 .*mmvim\[all\]'):
        require('mmengine', 'mmseg', 'mmdet')


@pytest.mark.parametrize(
    'config',
    ['vim-ti_8xb128_in1k.py', pytest.param('upernet_vim-ti_8xb4-60k_ade20k-512x512.py', marks=pytest.mark.slow)],
)
def test_transformers_that_breaks_a_host_is_named(run_python, tmp_path, config):
    """Its version is that of the distribution, and it lacks modules as version 5 lacks names."""
    for module in ('__init__', 'models/__init__', 'models/auto/__init__', 'models/auto/auto_factory'):
        path = tmp_path / 'transformers' / f'{module}.py'
        path.parent.mkdir(exist_ok=True)
        path.write_text('def __getattr__(name):\n    return type(name, (), {})\n')
    (tmp_path / 'transformers-5.1.0.dist-info').mkdir()
    (tmp_path / 'transformers-5.1.0.dist-info' / 'METADATA').write_text('Name: transformers\nVersion: 5.1.0\n')
    out = run_python(
        f"""
import sys
sys.stderr = sys.stdout
from mmvim.tools import command_line, train
try:
    command_line.run(train, ['vim/{config}', '--work-dir', 'work'])
except SystemExit as ended:
    assert ended.code == 1
"""
    )
    error = out.splitlines()[-1]
    assert error.startswith('error: mmpretrain cannot be loaded with the installed transformers 5.1.0 (')
    assert 'python -m pip install "transformers<5", or python -m pip uninstall transformers' in error
