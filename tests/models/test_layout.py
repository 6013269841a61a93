"""Which package imports which, and the paths that modules had before."""

import json

import pytest
import torch
from torch import nn

from mmvim.models import HierVim, MambaVision, VisionMamba, VisionTransformer
from mmvim.models.base import Backbone, run_block
from mmvim.weights.family import explain

SMALL = {
    VisionMamba: dict(arch=dict(embed_dims=16, depth=2), img_size=32),
    VisionTransformer: dict(arch=dict(embed_dims=16, depth=2, num_heads=2), img_size=32),
    HierVim: dict(arch=dict(embed_dims=16, depths=(1, 1, 1, 1))),
    MambaVision: dict(arch=dict(embed_dims=16, stem_channels=8, depths=(1, 1, 2, 2), num_heads=(1, 1, 2, 2))),
}


def test_reading_weights_needs_neither_a_model_nor_the_runner(run_python):
    out = run_python(
        """
import json, sys
import mmvim.weights
print(json.dumps([n for n in sys.modules if n.startswith(('mmvim.models', 'mmvim.engine', 'mmengine.runner', 'mmcv'))]))
"""
    )
    assert json.loads(out.splitlines()[-1]) == []


@pytest.mark.parametrize(
    'statement',
    [
        'from mmvim.checkpoints import *',
        'from mmvim.checkpoints.identify import LONG_SEQUENCE, Identity, identify',
        'from mmvim.checkpoints.reading import WEIGHT_KEYS, find_state_dict, load_from_local, read_checkpoint',
        'from mmvim.checkpoints.fitting import Conversion, LoadReport, abridge, compare',
        'from mmvim.models.backbones.vision_mamba import VisionMamba, VimBlock',
        'from mmvim.models.backbones.vision_transformer import VisionTransformer',
        'from mmvim.models.backbones.mambavision import MambaVision, attention_places',
        'from mmvim.models.backbones.hier_vim import HierVim',
        'from mmvim.models.layers import MambaVisionMixer',
        'import mmvim.models.layers.mambavision_mixer as m; m.CONVS',
        'from mmvim.compat import prepare_hosts',
    ],
)
def test_old_paths_lead_to_the_new_ones(statement):
    exec(statement, {})


@pytest.mark.parametrize('cls', SMALL)
def test_a_backbone_leaves_to_the_base_what_all_share(cls):
    assert issubclass(cls, Backbone)
    own = {'get_layer_depth', 'no_weight_decay', 'freeze', 'out_channels', 'out_strides', '_arch_settings'} & set(
        vars(cls)
    )
    assert own <= {'_arch_settings'}, 'which may add a check'


@pytest.mark.parametrize('cls', SMALL)
def test_every_way_to_misfit_has_a_reason_with_both_values(cls):
    """Each argument that shows in weights is named with the value in the file, that in the model, and the remedy."""
    model = cls(**SMALL[cls])
    other = cls(**{**SMALL[cls], 'in_channels': 4})
    (reason,) = explain(model, other.state_dict())
    assert reason == 'the file has in_channels 4, the model 3: set in_channels=4'
    assert explain(model, model.state_dict()) == []
    named = cls(next(iter(cls.arch_zoo)))
    reasons = explain(model, named.state_dict())
    assert reasons[0].endswith(f'set arch={list(cls.arch_zoo)[1]!r}') and reasons[0].startswith(
        'the file has embed_dims'
    )


def test_a_pattern_of_attention_that_no_argument_gives_is_told():
    model = MambaVision(**SMALL[MambaVision])
    weights = {
        name: value for name, value in model.state_dict().items() if not name.startswith('levels.3.blocks.1.mixer.qkv')
    }
    (reason,) = explain(model, weights)
    assert reason.startswith(
        "the file has attention (False, True, False, False), the model 'last': no value of attention"
    )


def test_checkpointing_keeps_statistics_and_results():
    torch.manual_seed(0)
    block = nn.Sequential(nn.Conv2d(3, 3, 1), nn.BatchNorm2d(3)).train()
    x = torch.randn(2, 3, 4, 4, requires_grad=True)
    run_block(block, True, x).sum().backward()
    assert block[1].num_batches_tracked == 1
