"""Files on disk through the functions by which the hosts load them."""

import copy

import pytest
import torch
from mmengine.config import Config
from mmengine.runner.checkpoint import load_checkpoint
from safetensors.torch import save_file
from torch import nn

from mmvim.errors import CheckpointError
from mmvim.models import MambaVision, VisionMamba, VisionTransformer

VIM = dict(type='mmvim.VisionMamba', arch=dict(embed_dims=32, depth=2, d_state=4), img_size=64)
BACKBONES = dict(
    vim=(VisionMamba, VIM, 32),
    deit=(
        VisionTransformer,
        dict(type='mmvim.VisionTransformer', arch=dict(embed_dims=32, depth=2, num_heads=2), img_size=64),
        32,
    ),
    mambavision=(
        MambaVision,
        dict(
            type='mmvim.MambaVision',
            arch=dict(embed_dims=16, stem_channels=8, depths=(1, 1, 2, 2), num_heads=(1, 1, 2, 4)),
            out_type='avg_featmap',
        ),
        128,
    ),
)


def randomised(model):
    for parameter in model.parameters():
        nn.init.normal_(parameter, std=0.1)
    return model


def build(cls, settings):
    return randomised(cls(**{key: value for key, value in settings.items() if key != 'type'}))


@pytest.fixture(params=BACKBONES)
def published(request, tmp_path):
    """A config of a classifier, the weights that a published file of it holds, and the file."""
    torch.manual_seed(0)
    cls, settings, width = BACKBONES[request.param]
    prefix = 'model.' if request.param == 'mambavision' else ''
    weights = {prefix + name: value for name, value in build(cls, settings).state_dict().items()}
    weights |= {f'{prefix}head.weight': torch.randn(10, width), f'{prefix}head.bias': torch.randn(10)}
    if request.param == 'mambavision':
        path = tmp_path / 'model.safetensors'
        save_file(weights, path)
    else:
        path = tmp_path / 'published.pth'
        torch.save({'model': weights, 'epoch': 299}, path)
    head = dict(type='LinearClsHead', num_classes=10, in_channels=width)
    config = Config(dict(model=dict(type='ImageClassifier', backbone=settings, head=head)))
    return config, {name.removeprefix(prefix): value for name, value in weights.items()}, str(path)


def test_a_published_classifier_is_loaded_whole_by_get_model(published):
    from mmpretrain import get_model

    config, weights, path = published
    model = get_model(config, pretrained=path)
    assert torch.equal(model.head.fc.weight, weights['head.weight'])
    assert torch.equal(model.head.fc.bias, weights['head.bias'])
    found = model.backbone.state_dict()
    assert all(torch.equal(value, weights[name]) for name, value in found.items() if name in weights)
    assert found.keys() - weights.keys() == set()


def test_a_published_classifier_without_a_weight_is_refused_by_get_model(published, tmp_path):
    from mmpretrain import get_model

    config, weights, _ = published
    gone = next(name for name in weights if name.endswith(('x_proj.weight', 'qkv.weight')))
    torch.save({name: value for name, value in weights.items() if name != gone}, tmp_path / 'part.pth')
    with pytest.raises(CheckpointError, match=f"part.pth' does not fit .*1 missing in the file.*{gone}"):
        get_model(config, pretrained=str(tmp_path / 'part.pth'))


def test_a_file_of_another_model_is_refused_by_get_model(published, tmp_path):
    from mmpretrain import get_model

    torch.save({'conv1.weight': torch.ones(4, 3, 7, 7), 'fc.weight': torch.ones(10, 4)}, tmp_path / 'resnet.pth')
    with pytest.raises(CheckpointError, match=r'this is no \w+ checkpoint, it holds conv1.weight, fc.weight'):
        get_model(published[0], pretrained=str(tmp_path / 'resnet.pth'))


def test_a_backbone_of_a_host_is_loaded_as_ever(tmp_path):
    from mmpretrain import get_model

    head = dict(type='LinearClsHead', num_classes=10, in_channels=32)
    backbone = dict(type='TIMMBackbone', model_name='test_vit', in_channels=3)
    config = Config(dict(model=dict(type='ImageClassifier', backbone=backbone, head=dict(head, in_channels=64))))
    source = randomised(get_model(copy.deepcopy(config)))
    torch.save({'state_dict': source.state_dict()}, tmp_path / 'own.pth')
    torch.save({'head.fc.weight': torch.ones(10, 64)}, tmp_path / 'part.pth')
    model = get_model(config, pretrained=str(tmp_path / 'own.pth'))
    assert all(torch.equal(value, source.state_dict()[name]) for name, value in model.state_dict().items())
    load_checkpoint(model, str(tmp_path / 'part.pth'))
    assert model.head.fc.weight.eq(1).all()


class Detector(nn.Module):
    def __init__(self, **settings):
        super().__init__()
        self.backbone = build(VisionMamba, {**VIM, **settings})
        self.neck = nn.Linear(32, 3)


def test_a_published_file_for_a_whole_model_that_is_no_classifier_is_refused(tmp_path):
    torch.save({'model': build(VisionMamba, VIM).state_dict()}, tmp_path / 'vim.pth')
    with pytest.raises(CheckpointError, match=r"no weights under 'backbone\.'.* model\.backbone\.init_cfg=dict\("):
        load_checkpoint(Detector(), str(tmp_path / 'vim.pth'))


def init_with_prefix(path, prefix='backbone.', **settings):
    pretrained = dict(type='Pretrained', checkpoint=str(path), prefix=prefix)
    model = VisionMamba(**{key: value for key, value in {**VIM, **settings}.items() if key != 'type'})
    model.init_cfg = pretrained
    model.init_weights()
    return model


@pytest.mark.parametrize('prefix', ['backbone.', 'backbone', 'model.backbone.'])
@pytest.mark.parametrize('layout', ['middle', 'head'])
def test_init_cfg_with_a_prefix_knows_grid_and_class_token(tmp_path, prefix, layout):
    whole = Detector(img_size=(64, 96), cls_token=layout)
    table = torch.arange(25.0)[None, :, None].expand(1, 25, 32).clone()
    whole.backbone.pos_embed.data = table
    if prefix == 'model.backbone.':
        whole = nn.ModuleDict(dict(model=whole, teacher=nn.Linear(2, 2)))
    torch.save({'state_dict': whole.state_dict()}, tmp_path / 'whole.pth')
    dense = dict(cls_token=None, out_type='featmap')
    kept = [i for i in range(25) if i != {'middle': 12, 'head': 0}[layout]]
    same = init_with_prefix(tmp_path / 'whole.pth', prefix, img_size=(64, 96), **dense)
    assert same.pos_embed[0, :, 0].tolist() == kept
    turned = init_with_prefix(tmp_path / 'whole.pth', prefix, img_size=(96, 64), **dense)
    assert turned.load_report.interpolated == ['pos_embed from 4x6 to 6x4']


def test_init_cfg_with_a_prefix_refuses_what_does_not_fit(tmp_path):
    weights = Detector().state_dict()
    torch.save(weights, tmp_path / 'whole.pth')
    init_with_prefix(tmp_path / 'whole.pth')
    del weights['backbone.layers.1.mixer.x_proj.weight']
    torch.save(weights, tmp_path / 'part.pth')
    for init in (dict(), dict(prefix='backbone')):
        with pytest.raises(
            CheckpointError, match=r"part.pth' does not fit .*1 missing in the file \(layers.1.mixer.x_proj"
        ):
            init_with_prefix(tmp_path / 'part.pth', **init)
    torch.save(build(VisionMamba, VIM).state_dict(), tmp_path / 'bare.pth')
    with pytest.raises(CheckpointError, match=r"bare.pth' has no weights under 'backbone\.'.*leave prefix out"):
        init_with_prefix(tmp_path / 'bare.pth')
