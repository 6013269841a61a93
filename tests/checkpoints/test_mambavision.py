import argparse
import copy
import json
import pickle
from collections import OrderedDict
from pathlib import Path

import pytest
import torch
from mmengine.config import Config
from mmengine.runner.checkpoint import load_checkpoint
from safetensors.torch import save_file
from torch import nn

import mmvim  # noqa: F401
from mmvim.checkpoints import mambavision_state_dict, to_classifier
from mmvim.errors import CheckpointError
from mmvim.models import MambaVision
from mmvim.models.identify import identify

ARCH = dict(embed_dims=16, stem_channels=8, depths=(1, 1, 3, 2), num_heads=(1, 2, 2, 4))
REPOSITORY = Path(__file__).parents[2]
README = (REPOSITORY / 'configs' / 'mambavision' / 'README.md').read_text()
KEYS = json.loads((Path(__file__).parents[1] / 'data' / 'mambavision_t_keys.json').read_text())


def mambavision(**settings):
    return MambaVision(**{'arch': ARCH, 'window_sizes': (8, 8, 4, 2), **settings})


def classifier_weights(num_classes=10, **settings):
    """Weights by published name, as random as a trained model's."""
    torch.manual_seed(0)
    model = mambavision(out_type='avg_featmap', **settings)
    for parameter in model.parameters():
        nn.init.normal_(parameter, std=0.1)
    width = model.out_channels[-1]
    return OrderedDict(
        **model.state_dict(), **{'head.weight': torch.randn(num_classes, width), 'head.bias': torch.randn(num_classes)}
    )


def init_from(model, path):
    model.init_cfg = dict(type='Pretrained', checkpoint=str(path))
    model.init_weights()
    return model


def test_the_published_tiny_file_fits_the_classifier_and_the_dense_backbone():
    weights = OrderedDict((name, torch.zeros(shape)) for name, shape in KEYS.items())
    classifier, dense = MambaVision('tiny', out_type='avg_featmap'), MambaVision('tiny', window_sizes=(8, 8, 112, 56))
    assert str(classifier.load_state_dict(weights)) == '<All keys matched successfully>'
    result = dense.load_state_dict(weights, strict=False)
    assert result.missing_keys == [f'outnorm{i}.{leaf}' for i in range(4) for leaf in ('weight', 'bias')]
    assert result.unexpected_keys == []
    converted = mambavision_state_dict(weights)
    assert converted.dropped == [name for name in KEYS if name.startswith(('norm.', 'head.'))]
    assert all(converted.state_dict[name] is weights[name] for name in converted.state_dict)


def save_as(kind, weights, folder):
    """The forms in which weights of MambaVision are published, and those of wrapped models."""
    path = folder / ('model.safetensors' if kind.endswith('safetensors') else 'model.pth.tar')
    prefix = {'model. safetensors': 'model.', 'module.': 'module.'}.get(kind, '')
    weights = OrderedDict((prefix + name, value) for name, value in weights.items())
    if kind.endswith('safetensors'):
        save_file(weights, path)
    else:
        key = 'model' if kind == 'model' else 'state_dict'
        content = dict(epoch=299, arch='mamba_vision_T', args=argparse.Namespace(lr=5e-3))
        torch.save(weights if kind == 'bare' else {**content, key: weights}, path)
    return path


@pytest.mark.parametrize('kind', ['state_dict', 'model', 'module.', 'bare', 'safetensors', 'model. safetensors'])
def test_init_cfg_loads_published_files_as_they_are(tmp_path, kind):
    weights = classifier_weights()
    path = save_as(kind, weights, tmp_path)
    for model in (mambavision(), mambavision(out_type='avg_featmap'), mambavision(out_indices=(0, 2))):
        found = init_from(model, path).state_dict()
        own = {name for name in found if name.startswith('outnorm')}
        assert len(own) == 2 * len(model.out_indices) * (model.out_type == 'featmap')
        for name in found.keys() - own:
            assert torch.equal(found[name], weights[name]), name
        assert all(found[name].eq(float(name.endswith('weight'))).all() for name in own)


class Detector(nn.Module):
    def __init__(self, backbone):
        super().__init__()
        self.backbone = backbone
        self.head = nn.Linear(128, 3)


def test_whole_models_and_their_backbones(tmp_path):
    source, target = Detector(mambavision()), Detector(mambavision())
    for parameter in source.parameters():
        nn.init.normal_(parameter, std=0.1)
    torch.save({'state_dict': source.state_dict()}, tmp_path / 'd.pth')
    load_checkpoint(target, str(tmp_path / 'd.pth'), map_location='cpu', strict=True)
    alone = init_from(mambavision(), tmp_path / 'd.pth')
    for name, value in source.backbone.state_dict().items():
        assert torch.equal(target.backbone.state_dict()[name], value)
        assert torch.equal(alone.state_dict()[name], value)


@pytest.mark.parametrize(
    ('settings', 'remedy'),
    [
        (dict(arch='small'), 'the file has embed_dims 16, the model 96: set embed_dims=16 in arch; .*stem_channels 8'),
        (dict(arch=dict(ARCH, depths=(1, 1, 4, 2))), r'depths \(1, 1, 3, 2\), the model \(1, 1, 4, 2\): set depths=\('),
        (
            dict(arch=dict(ARCH, depths=(1, 1, 2, 1)), out_indices=(2,)),
            r'depths \(1, 1, 3, 2\), the model \(1, 1, 2, 1\): set depths=\(1, 1, 3, 2\) in arch$',
        ),
        (dict(arch=dict(ARCH, layer_scale=1e-5)), 'layer_scale None, the model 1e-05: set layer_scale=None in arch$'),
        (dict(in_channels=1), 'the file has in_channels 3, the model 1: set in_channels=3'),
        (dict(attention='early'), "the file has attention 'last', the model 'early': set attention='last'$"),
        (dict(arch=dict(ARCH, d_state=16)), 'the file has d_state 8, the model 16: set d_state=8 in arch'),
        (dict(arch=dict(ARCH, d_conv=4)), 'the file has d_conv 3, the model 4: set d_conv=3 in arch'),
        (dict(arch=dict(ARCH, mlp_ratio=2)), 'the file has mlp_ratio 4.0, the model 2.0: set mlp_ratio=4.0 in arch'),
        (dict(attention='early', out_indices=(0, 1, 2)), "attention 'last', the model 'early': set attention='last'$"),
        (dict(mixer_symmetric=False), 'the file has mixer_symmetric True, the model False: set mixer_symmetric=True'),
        (dict(mixer_merge='gate'), "the file has mixer_merge 'concat', the model 'gate': set mixer_merge='concat'"),
    ],
)
def test_a_file_of_another_mambavision_is_refused_with_the_remedy(tmp_path, settings, remedy):
    path = save_as('state_dict', classifier_weights(), tmp_path)
    with pytest.raises(CheckpointError, match=rf"model\.pth\.tar' does not fit MambaVision: .*Remedy: .*{remedy}"):
        init_from(mambavision(**settings), path)


def test_settings_without_a_trace_in_the_weights_are_identified():
    saved = mambavision(mixer_conv='causal', fit_windows=True)
    found = identify(saved.state_dict())
    expected = dict(mixer_conv='causal', fit_windows=True, window_sizes=(8, 8, 4, 2))
    assert {key: found.backbone[key] for key in expected} == expected and not found.notes
    assert found.backbone['arch']['num_heads'] == tuple(ARCH['num_heads'])


def test_what_is_identified_takes_the_file():
    arch = dict(ARCH, d_conv=4, mlp_ratio=2, d_state=4)
    weights = mambavision(arch=arch, attention='early').state_dict()
    found = identify(weights)
    assert found.backbone['arch'] == arch | dict(layer_scale=None)
    settings = {key: value for key, value in found.backbone.items() if key != 'type'}
    MambaVision(**settings).load_state_dict(weights)


def test_a_published_size_is_named(tmp_path):
    path = save_as('bare', OrderedDict((name, torch.zeros(shape)) for name, shape in KEYS.items()), tmp_path)
    with pytest.raises(CheckpointError, match="set arch='tiny'$"):
        init_from(MambaVision('tiny2'), path)


def test_another_pattern_of_attention_is_named(tmp_path):
    path = save_as('bare', classifier_weights(attention='early'), tmp_path)
    with pytest.raises(CheckpointError, match="set attention='early'"):
        init_from(mambavision(), path)


def test_incomplete_and_foreign_files(tmp_path):
    weights = classifier_weights()
    weights.pop('levels.2.blocks.1.mixer.x_proj.weight')
    path = save_as('bare', weights, tmp_path)
    message = r'1 missing in the file \(levels\.2\.blocks\.1\.mixer\.x_proj\.weight\).*Remedy: the file is incomplete'
    with pytest.raises(CheckpointError, match=message):
        init_from(mambavision(), path)
    torch.save({'blocks.0.attn.qkv.weight': torch.ones(6, 2)}, path)
    with pytest.raises(CheckpointError, match=r'no MambaVision checkpoint, it holds blocks\.0\.attn\.qkv\.weight'):
        init_from(mambavision(), path)
    torch.save(mambavision().state_dict(), path)
    with pytest.raises(CheckpointError, match="lacks the classifier's norm: set out_type='featmap'"):
        init_from(mambavision(out_type='avg_featmap'), path)


def test_models_can_still_be_pickled_and_copied():
    model = mambavision()
    for twin in (pickle.loads(pickle.dumps(model)), copy.deepcopy(model)):
        twin.load_state_dict(model.state_dict())


def test_whole_classifiers_get_the_names_of_mmpretrain():
    from mmpretrain.registry import MODELS

    classifier = MODELS.build(
        dict(
            type='ImageClassifier',
            _scope_='mmpretrain',
            backbone=dict(type='mmvim.MambaVision', arch=ARCH, out_type='avg_featmap'),
            head=dict(type='LinearClsHead', num_classes=10, in_channels=128),
        )
    )
    weights = classifier_weights()
    for prefix in ('', 'model.'):
        published = {prefix + name: value for name, value in weights.items()}
        assert str(classifier.load_state_dict(to_classifier(published))) == '<All keys matched successfully>'
        assert torch.equal(classifier.head.fc.weight, weights['head.weight'])


def parameters(config, change=None):
    """Parameters of a config's model, 1e6, changed before it is built."""
    from mmengine.registry import MODELS, init_default_scope

    cfg = Config.fromfile(REPOSITORY / 'configs' / 'mambavision' / config)
    if change is not None:
        change(cfg.model)
    init_default_scope(cfg.default_scope)
    with torch.device('meta'):
        model = MODELS.build(cfg.model)
    return model, round(sum(parameter.numel() for parameter in model.parameters()) / 1e6, 1)


def box_heads(**settings):
    def change(model):
        for head in model.roi_head.bbox_head:
            head.update(settings)

    return change


LINEAR = dict(num_shared_convs=0, num_shared_fcs=2)


@pytest.mark.parametrize(
    'change, expected',
    [
        (None, 89.2),
        (box_heads(reg_class_agnostic=True), 88.2),
        (box_heads(**LINEAR), 85.3),
        (box_heads(**LINEAR, reg_class_agnostic=True), 84.3),
        (lambda model: model.roi_head.update(mask_head=None, mask_roi_extractor=None), 81.3),
    ],
)
def test_the_counts_of_cascades_in_the_readme(change, expected):
    model, count = parameters('cascade-mask-rcnn_mambavision-t_fpn_4conv1fc-giou_amp-ms-crop-3x_coco.py', change)
    assert count == expected and f'| {expected} |' in README
    if change is None:
        one = sum(parameter.numel() for parameter in model.roi_head.mask_head[0].parameters()) / 1e6
        assert len(model.roi_head.mask_head) == 3 and f'| one mask head | {count - 2 * one:.1f} |' in README


@pytest.mark.parametrize(
    'change, expected',
    [
        (None, 62.5),
        (lambda model: model.update(auxiliary_head=None), 61.7),
        (lambda model: model.decode_head.update(channels=384), 50.0),
        (lambda model: model.decode_head.update(channels=256), 40.7),
    ],
)
def test_the_counts_of_upernets_in_the_readme(change, expected):
    _, count = parameters('upernet_mambavision-t_8xb2-160k_ade20k-512x512.py', change)
    assert count == expected and f'| {expected:.1f} |' in README
