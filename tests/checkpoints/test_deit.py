"""DeiT weights in timm's, the original, detectron2's and MMPretrain's naming, fitted to a VisionTransformer."""

import argparse
import copy
import pickle
from collections import OrderedDict

import pytest
import torch
import torch.nn.functional as F
from mmengine.runner.checkpoint import load_checkpoint
from safetensors.torch import save_file
from torch import nn

from mmvim.checkpoints import deit_state_dict, to_classifier
from mmvim.errors import CheckpointError
from mmvim.models import VisionTransformer

SMALL = dict(embed_dims=32, depth=4, num_heads=2)


def deit(**settings):
    return VisionTransformer(**{'arch': SMALL, **settings})


def dense(**settings):
    return deit(**{'with_cls_token': False, 'out_type': 'featmap', **settings})


@pytest.fixture
def classifier_weights():
    """Weights of a small classifier by published name."""
    torch.manual_seed(0)
    model = deit(img_size=224)
    for parameter in model.parameters():
        nn.init.normal_(parameter, std=0.1)
    return OrderedDict(**model.state_dict(), **{'head.weight': torch.randn(10, 32), 'head.bias': torch.randn(10)})


def init_from(model, path):
    model.init_cfg = dict(type='Pretrained', checkpoint=str(path))
    model.init_weights()
    return model


def mmpretrain_names(weights):
    """The same weights as MMPretrain's VisionTransformer names them."""
    renamed = {}
    for name, value in weights.items():
        name = name.replace('patch_embed.proj.', 'patch_embed.projection.').replace('blocks.', 'layers.')
        name = name.replace('.norm1.', '.ln1.').replace('.norm2.', '.ln2.')
        name = name.replace('.mlp.fc1.', '.ffn.layers.0.0.').replace('.mlp.fc2.', '.ffn.layers.1.')
        name = 'ln1.' + name.removeprefix('norm.') if name.startswith('norm.') else name
        renamed['head.layers.' + name if name.startswith('head.') else f'backbone.{name}'] = value
    return renamed


def detectron2_names(weights):
    """As in a ViTDet: the net of a pyramid, no class token but its entry in the position table, no final norm."""
    kept = {name: value for name, value in weights.items() if not name.startswith(('cls_token', 'norm.', 'head.'))}
    return {**{f'backbone.net.{name}': v for name, v in kept.items()}, 'backbone.simfp_4.0.weight': torch.ones(1)}


def save_as(kind, weights, folder):
    path = folder / ('deit.safetensors' if kind == 'safetensors' else 'deit.pth')
    if kind == 'safetensors':
        save_file(weights, path)
    elif kind == 'timm':
        torch.save(weights, path)
    elif kind == 'original':
        torch.save({'model': weights, 'epoch': 299, 'args': argparse.Namespace(lr=1e-3)}, path)
    elif kind == 'mmpretrain':
        torch.save({'meta': {}, 'state_dict': mmpretrain_names(weights)}, path)
    else:
        torch.save({'model': detectron2_names(weights), 'iteration': 1}, path)
    return path


def interpolated(weights, grid):
    table = weights['pos_embed'][:, 1:].reshape(1, 14, 14, 32).permute(0, 3, 1, 2)
    return F.interpolate(table, grid, mode='bicubic', align_corners=False).flatten(2).transpose(1, 2)


@pytest.mark.parametrize('kind', ['timm', 'original', 'safetensors', 'mmpretrain', 'detectron2'])
def test_init_cfg_loads_files_as_they_are(tmp_path, classifier_weights, kind):
    path = save_as(kind, classifier_weights, tmp_path)
    model = init_from(dense(img_size=(112, 320), window_size=3, global_attn_indexes=(3,)), path)
    found = model.state_dict()
    assert torch.equal(found.pop('pos_embed'), interpolated(classifier_weights, (7, 20)))
    assert set(found) == {n for n in classifier_weights if not n.startswith(('cls_token', 'pos_', 'norm.', 'head.'))}
    assert all(torch.equal(found[name], classifier_weights[name]) for name in found)
    if kind == 'detectron2':
        with pytest.raises(CheckpointError, match='lacks a class token: set with_cls_token=False; .* final_norm=False'):
            init_from(deit(), path)
    else:
        model = init_from(deit(), path)
        assert all(torch.equal(value, classifier_weights[name]) for name, value in model.state_dict().items())


def test_nothing_to_convert_leaves_the_tensors_themselves():
    state_dict = deit(img_size=(64, 96)).state_dict()
    result = deit_state_dict(state_dict, with_cls_token=True, grid_size=(4, 6))
    assert all(result.state_dict[name] is state_dict[name] for name in state_dict)
    assert not result.dropped and not result.interpolated


def test_what_is_dropped_and_interpolated_is_told(classifier_weights):
    result = deit_state_dict(
        classifier_weights, with_cls_token=False, grid_size=(7, 20), depth=4, num_blocks=3, final_norm=False
    )
    dropped = [name for name in classifier_weights if name.startswith(('cls_token', 'blocks.3.', 'norm.', 'head.'))]
    assert result.dropped == [*dropped, 'pos_embed[0]']
    assert result.interpolated == ['pos_embed from 14x14 to 7x20']


def test_distilled_files_serve_dense_prediction_only(tmp_path, classifier_weights):
    distilled = OrderedDict(classifier_weights)
    distilled['dist_token'] = torch.randn(1, 1, 32)
    distilled['head_dist.weight'], distilled['head_dist.bias'] = torch.randn(10, 32), torch.randn(10)
    table = classifier_weights['pos_embed']
    distilled['pos_embed'] = torch.cat((table[:, :1], torch.randn(1, 1, 32), table[:, 1:]), dim=1)
    path = save_as('original', distilled, tmp_path)
    assert torch.equal(init_from(dense(), path).pos_embed, table[:, 1:])
    assert torch.equal(init_from(deit(out_type='featmap'), path).pos_embed, table)
    with pytest.raises(CheckpointError, match='distilled DeiT, which classifies by two tokens'):
        init_from(deit(), path)


@pytest.mark.parametrize('size', [(64, 96), (96, 64), (128, 128)])
@pytest.mark.parametrize('source_token', [False, True])
def test_our_own_files_load_at_another_image_size(tmp_path, source_token, size):
    """(96, 64) has as many patches as (64, 96), which no shape tells apart."""
    source = dense(img_size=(64, 96), with_cls_token=source_token)
    nn.init.normal_(source.pos_embed)
    torch.save({'state_dict': source.state_dict()}, tmp_path / 'd.pth')
    target = dense(img_size=size)
    load_checkpoint(target, str(tmp_path / 'd.pth'), map_location='cpu', strict=True)
    expected = source.pos_embed[:, int(source_token) :]
    if size != (64, 96):
        table = expected.reshape(1, 4, 6, 32).permute(0, 3, 1, 2)
        expected = F.interpolate(table, (size[0] // 16, size[1] // 16), mode='bicubic', align_corners=False)
        expected = expected.flatten(2).transpose(1, 2)
    assert torch.equal(target.pos_embed, expected)


@pytest.mark.parametrize('size', [(64, 96), (96, 64), (128, 128)])
def test_a_bare_backbone_knows_the_grid_of_a_whole_model(tmp_path, size):
    source = nn.ModuleDict(dict(backbone=deit(img_size=(64, 96)), head=nn.Linear(32, 3)))
    nn.init.normal_(source.backbone.pos_embed)
    torch.save({'state_dict': source.state_dict()}, tmp_path / 'd.pth')
    expected = source.backbone.pos_embed[:, 1:]
    if size != (64, 96):
        table = expected.reshape(1, 4, 6, 32).permute(0, 3, 1, 2)
        expected = F.interpolate(table, (size[0] // 16, size[1] // 16), mode='bicubic', align_corners=False)
        expected = expected.flatten(2).transpose(1, 2)
    assert torch.equal(init_from(dense(img_size=size), tmp_path / 'd.pth').pos_embed, expected)


@pytest.mark.parametrize(
    ('settings', 'remedy'),
    [
        (
            dict(arch='deit-small'),
            'embed_dims 32, the model 384: set embed_dims=32 in arch; the file has depth 4, the model 12: ',
        ),
        (dict(arch=dict(SMALL, depth=6)), 'the file has depth 4, the model 6: set depth=4'),
        (dict(arch=dict(SMALL, depth=2)), 'the file has depth 4, the model 2: set depth=4'),
        (dict(patch_size=8), 'the file has patch_size 16, the model 8: set patch_size=16'),
        (dict(in_channels=1), 'the file has in_channels 3, the model 1: set in_channels=3'),
    ],
)
def test_a_file_of_another_size_is_refused_with_the_remedy(tmp_path, classifier_weights, settings, remedy):
    path = save_as('original', classifier_weights, tmp_path)
    with pytest.raises(CheckpointError, match=rf"deit\.pth' does not fit VisionTransformer: .*Remedy: .*{remedy}"):
        init_from(deit(**settings), path)


def test_a_published_size_is_named(tmp_path):
    torch.save({'model': deit(arch='deit-tiny').state_dict()}, tmp_path / 't.pth')
    named = "the file has embed_dims 192, the model 32, depth 12, the model 4: set arch='deit-tiny'$"
    with pytest.raises(CheckpointError, match=named):
        init_from(deit(), tmp_path / 't.pth')


def test_files_of_other_models_are_refused(tmp_path, classifier_weights):
    torch.save(
        {'model': {'layers.0.mixer.A_log': torch.ones(6, 2), 'norm_f.weight': torch.ones(2)}}, tmp_path / 'v.pth'
    )
    with pytest.raises(CheckpointError, match=r'no DeiT checkpoint, it holds layers\.0\.mixer\.A_log'):
        init_from(deit(), tmp_path / 'v.pth')
    classifier_weights['blocks.0.attn.rel_pos_h'] = torch.ones(27, 16)
    path = save_as('timm', classifier_weights, tmp_path)
    with pytest.raises(CheckpointError, match='the file has relative positions, which this model has not'):
        init_from(deit(), path)
    with pytest.raises(CheckpointError, match='150 patch positions, which is no square grid'):
        deit_state_dict({'pos_embed': torch.ones(1, 150, 2)}, with_cls_token=False, grid_size=(14, 14))


def test_models_can_still_be_pickled_and_copied():
    model = deit(img_size=64)
    for twin in (pickle.loads(pickle.dumps(model)), copy.deepcopy(model)):
        twin.load_state_dict(deit(img_size=96).state_dict())


def test_whole_classifiers_get_the_names_of_mmpretrain(classifier_weights):
    from mmpretrain.registry import MODELS

    classifier = MODELS.build(
        dict(
            type='ImageClassifier',
            _scope_='mmpretrain',
            backbone=dict(type='mmvim.VisionTransformer', arch=SMALL),
            head=dict(type='LinearClsHead', num_classes=10, in_channels=32),
        )
    )
    classifier.load_state_dict(to_classifier(classifier_weights), strict=True)
    assert torch.equal(classifier.head.fc.weight, classifier_weights['head.weight'])
    assert torch.equal(classifier.backbone.cls_token, classifier_weights['cls_token'])
