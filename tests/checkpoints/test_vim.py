import argparse
import copy
import pickle

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from mmengine.model import BaseModel
from mmengine.runner.checkpoint import load_checkpoint
from torch import nn

from mmvim.checkpoints import to_classifier, vim_state_dict
from mmvim.errors import CheckpointError
from mmvim.models import VisionMamba

SMALL = dict(embed_dims=32, depth=4, d_state=4)


def vim(**settings):
    return VisionMamba(**{'arch': SMALL, **settings})


def dense(**settings):
    return vim(**{'cls_token': None, 'out_type': 'featmap', 'out_indices': (1, 3), **settings})


def numbered(num_tokens, names=()):
    """A file whose position table holds the number of each entry."""
    table = torch.arange(num_tokens, dtype=torch.float32)[None, :, None].expand(1, num_tokens, 2).clone()
    return {**{name: torch.full((1, 1, 2), -1.0) for name in names}, 'pos_embed': table}


@pytest.mark.parametrize(
    ('num_tokens', 'names', 'grid', 'taken_out'),
    [
        (197, ['cls_token'], 14, [98]),
        (730, ['cls_token'], 27, [364]),
        (198, ['cls_token_head', 'cls_token_tail'], 14, [0, 197]),
        (196, [], 14, []),
        (2, ['cls_token'], 1, [0]),
        (10, ['cls_token'], 3, [4]),
    ],
)
def test_class_token_entries_are_dropped_from_where_they_are(num_tokens, names, grid, taken_out):
    result = vim_state_dict(numbered(num_tokens, names), cls_token=None, grid_size=(grid, grid))
    kept = [i for i in range(num_tokens) if i not in taken_out]
    assert result.state_dict['pos_embed'][0, :, 0].tolist() == kept
    assert result.dropped == [*names, *(f'pos_embed[{i}]' for i in taken_out)]
    assert result.interpolated == []


def test_class_token_at_the_head_if_told_so():
    result = vim_state_dict(numbered(197, ['cls_token']), cls_token=None, grid_size=(14, 14), source_cls_token='head')
    assert result.state_dict['pos_embed'][0, :, 0].tolist() == list(range(1, 197))


@pytest.mark.parametrize('grid', [(14, 14), (32, 32), (7, 20), (1, 1), (3, 188)])
@pytest.mark.parametrize('layout', [None, 'middle', 'head', 'double'])
def test_positions_are_interpolated_and_class_tokens_put_back(grid, layout):
    names = {None: [], 'double': ['cls_token_head', 'cls_token_tail']}.get(layout, ['cls_token'])
    table = torch.randn(1, 196 + len(names), 8, generator=torch.Generator().manual_seed(0))
    places = {None: [], 'middle': [98], 'head': [0], 'double': [0, 197]}[layout]
    result = vim_state_dict(
        {**{name: torch.ones(1, 1, 8) for name in names}, 'pos_embed': table}, cls_token=layout, grid_size=grid
    )

    patches = torch.from_numpy(np.delete(table.numpy(), places, axis=1))
    expected = F.interpolate(
        patches.reshape(1, 14, 14, 8).permute(0, 3, 1, 2), grid, mode='bicubic', align_corners=False
    )
    expected = expected.permute(0, 2, 3, 1).reshape(grid[0] * grid[1], 8)
    if grid == (14, 14):
        expected = patches[0]
    rows = list(expected)
    for place, old in zip(
        {'middle': [len(rows) // 2], 'double': [0, len(rows) + 1]}.get(layout, [0]), places, strict=False
    ):
        rows.insert(place, table[0, old])
    assert torch.equal(result.state_dict['pos_embed'][0], torch.stack(rows))
    assert set(result.state_dict) == {*names, 'pos_embed'}
    assert bool(result.interpolated) == (grid != (14, 14))


def test_nothing_to_convert_leaves_the_tensors_themselves():
    state_dict = vim(img_size=(64, 96)).state_dict()
    result = vim_state_dict(state_dict, cls_token='middle', grid_size=(4, 6))
    assert all(result.state_dict[name] is state_dict[name] for name in state_dict)


def test_low_precision_positions_keep_their_dtype():
    weights = {'pos_embed': torch.randn(1, 16, 8).bfloat16()}
    table = vim_state_dict(weights, cls_token=None, grid_size=(6, 5)).state_dict['pos_embed']
    assert table.dtype == torch.bfloat16
    exact = vim_state_dict({'pos_embed': weights['pos_embed'].float()}, cls_token=None, grid_size=(6, 5))
    assert torch.equal(table, exact.state_dict['pos_embed'].bfloat16())


def test_a_table_that_fits_no_grid():
    with pytest.raises(CheckpointError, match='150 patch positions, which is no square grid: build .* img_size'):
        vim_state_dict(numbered(150), cls_token=None, grid_size=(14, 14))
    with pytest.raises(CheckpointError, match=r'196 patch positions, which is not the grid \(7, 7\)'):
        vim_state_dict(numbered(196), cls_token=None, grid_size=(14, 14), source_grid=(7, 7))


@pytest.fixture
def published(tmp_path):
    """A file as the original training code writes it, of a small classifier with the class token in the middle."""
    torch.manual_seed(0)
    model = vim(img_size=224)
    for parameter in model.parameters():
        nn.init.normal_(parameter, std=0.1)
    weights = {**model.state_dict(), 'head.weight': torch.randn(10, 32), 'head.bias': torch.randn(10)}
    path = tmp_path / 'published.pth'
    torch.save({'model': weights, 'epoch': 299, 'args': argparse.Namespace(lr=1e-3)}, path)
    return path, model


def init_from(model, path):
    model.init_cfg = dict(type='Pretrained', checkpoint=str(path))
    model.init_weights()
    return model


def test_init_cfg_loads_a_published_file_into_a_dense_backbone(published):
    path, source = published
    model = init_from(dense(img_size=(112, 320)), path)
    expected = vim_state_dict(source.state_dict(), cls_token=None, grid_size=(7, 20)).state_dict
    found = model.state_dict()
    assert set(found) == set(expected) - {'norm_f.weight'}
    assert all(torch.equal(found[name], expected[name]) for name in found)
    outputs = model(torch.randn(1, 3, 112, 320))
    assert [tuple(out.shape) for out in outputs] == [(1, 32, 7, 20)] * 2


def test_blocks_that_are_not_built_are_dropped(published):
    path, source = published
    model = init_from(dense(img_size=224, out_indices=(1,)), path)
    assert len(model.layers) == 2
    assert torch.equal(model.layers[1].mixer.A_log, source.layers[1].mixer.A_log)


@pytest.mark.parametrize(
    ('settings', 'remedy'),
    [
        (
            dict(arch='small'),
            'embed_dims 32, the model 384: set embed_dims=32 in arch; the file has depth 4, the model 24: ',
        ),
        (dict(arch=dict(SMALL, depth=6)), r'the file has depth 4, the model 6: set depth=4'),
        (dict(arch=dict(SMALL, depth=2)), r'the file has depth 4, the model 2: set depth=4'),
        (dict(arch=dict(SMALL, d_state=8)), r'the file has d_state 4, the model 8: set d_state=4'),
        (dict(patch_size=8), r'the file has patch_size 16, the model 8: set patch_size=16'),
        (dict(in_channels=1), r'the file has in_channels 3, the model 1: set in_channels=3'),
        (dict(directions='v1'), r"the file has directions 'v2', the model 'v1': set directions='v2'"),
        (dict(directions='none'), r"the file has directions 'v2', .* set directions='v2'"),
        (dict(cls_token='double'), r"class tokens one, the model double: set cls_token='middle'"),
        (dict(layer_scale_init=1e-4), r'layer scale no, the model yes: set layer_scale_init=None'),
    ],
)
def test_a_file_of_another_vim_is_refused_with_the_remedy(published, settings, remedy):
    path, _ = published
    with pytest.raises(CheckpointError, match=rf"published\.pth' does not fit VisionMamba: .*Remedy: .*{remedy}"):
        init_from(vim(**settings), path)


def test_a_published_size_is_named(tmp_path):
    torch.save({'model': vim(arch='tiny').state_dict()}, tmp_path / 'tiny.pth')
    named = (
        "the file has embed_dims 192, the model 32, depth 24, the model 4, d_state 16, the model 4: set arch='tiny'$"
    )
    with pytest.raises(CheckpointError, match=named):
        init_from(vim(), tmp_path / 'tiny.pth')


def test_a_file_of_another_kind_of_model_is_refused(tmp_path):
    torch.save(
        {'model': {'blocks.0.attn.qkv.weight': torch.ones(6, 2), 'norm.weight': torch.ones(2)}}, tmp_path / 'd.pth'
    )
    with pytest.raises(CheckpointError, match=r'no Vim checkpoint, it holds blocks\.0\.attn\.qkv\.weight'):
        init_from(vim(), tmp_path / 'd.pth')


class Detector(BaseModel):
    def __init__(self, backbone):
        super().__init__()
        self.backbone = backbone
        self.head = nn.Linear(32, 3)

    def forward(self, inputs):
        return self.head(self.backbone(inputs)[-1].mean((2, 3)))


@pytest.mark.parametrize('size', [(64, 96), (96, 64), (128, 128)])
def test_whole_models_load_at_another_image_size(tmp_path, size):
    """(96, 64) has as many patches as (64, 96), which no shape tells apart."""
    source = Detector(dense(img_size=(64, 96)))
    nn.init.normal_(source.backbone.pos_embed)
    torch.save({'state_dict': source.state_dict()}, tmp_path / 'd.pth')
    target = Detector(dense(img_size=size))
    load_checkpoint(target, str(tmp_path / 'd.pth'), map_location='cpu', strict=True)
    grid = (size[0] // 16, size[1] // 16)
    expected = source.backbone.pos_embed
    if grid != (4, 6):
        table = expected.reshape(1, 4, 6, 32).permute(0, 3, 1, 2)
        expected = F.interpolate(table, grid, mode='bicubic', align_corners=False).flatten(2).transpose(1, 2)
    assert torch.equal(target.backbone.pos_embed, expected)
    assert torch.equal(target.head.weight, source.head.weight)


def test_a_bare_backbone_takes_its_part_of_a_whole_model(tmp_path):
    source = Detector(dense())
    nn.init.normal_(source.backbone.pos_embed)
    torch.save({'state_dict': {f'module.{k}': v for k, v in source.state_dict().items()}}, tmp_path / 'd.pth')
    model = init_from(dense(), tmp_path / 'd.pth')
    assert torch.equal(model.pos_embed, source.backbone.pos_embed)


@pytest.mark.parametrize('wrapped', [False, True], ids=['as it is', 'distributed'])
@pytest.mark.parametrize('saved', ['middle', 'head'])
def test_a_bare_backbone_knows_where_the_class_token_of_a_whole_model_stands(tmp_path, saved, wrapped):
    source = Detector(vim(img_size=64, cls_token=saved))
    source.backbone.pos_embed.data = numbered(17)['pos_embed'][..., :1].expand(1, 17, 32).clone()
    whole = nn.ModuleDict(dict(module=source)) if wrapped else source
    torch.save({'state_dict': whole.state_dict()}, tmp_path / 'd.pth')
    model = init_from(dense(img_size=64), tmp_path / 'd.pth')
    place = {'middle': 8, 'head': 0}[saved]
    assert model.pos_embed[0, :, 0].tolist() == [i for i in range(17) if i != place]


@pytest.mark.parametrize('size', [(160, 192), (192, 160), (96, 64)])
def test_a_bare_backbone_knows_the_grid_of_a_whole_model(tmp_path, size):
    """(192, 160) has as many patches as (160, 192), which no shape tells apart."""
    source = Detector(vim(img_size=(160, 192)))
    nn.init.normal_(source.backbone.pos_embed)
    torch.save({'state_dict': source.state_dict()}, tmp_path / 'd.pth')
    model = init_from(dense(img_size=size), tmp_path / 'd.pth')
    expected = torch.cat((source.backbone.pos_embed[:, :60], source.backbone.pos_embed[:, 61:]), dim=1)
    if size != (160, 192):
        table = expected.reshape(1, 10, 12, 32).permute(0, 3, 1, 2)
        expected = F.interpolate(table, (size[0] // 16, size[1] // 16), mode='bicubic', align_corners=False)
        expected = expected.flatten(2).transpose(1, 2)
    assert torch.equal(model.pos_embed, expected)


@pytest.mark.parametrize('saved', ['middle', 'head'])
def test_our_own_files_tell_where_a_single_class_token_stands(tmp_path, saved):
    source = vim(img_size=64, cls_token=saved)
    source.pos_embed.data = numbered(17)['pos_embed'][..., :1].expand(1, 17, 32).clone()
    torch.save(source.state_dict(), tmp_path / 'w.pth')
    model = init_from(dense(img_size=64), tmp_path / 'w.pth')
    place = {'middle': 8, 'head': 0}[saved]
    assert model.pos_embed[0, :, 0].tolist() == [i for i in range(17) if i != place]


def test_plain_load_state_dict():
    source, target = vim(img_size=64), vim(img_size=96)
    assert str(target.load_state_dict(source.state_dict())) == '<All keys matched successfully>'
    part = {'norm_f.weight': torch.full((32,), 2.0)}
    assert target.load_state_dict(part, strict=False).missing_keys
    assert target.norm_f.weight.eq(2).all()
    with pytest.raises(RuntimeError, match='Missing key'):
        target.load_state_dict(part)
    with pytest.raises(CheckpointError, match='checkpoint does not fit VisionMamba.*set embed_dims=16'):
        target.load_state_dict(vim(arch=dict(SMALL, embed_dims=16)).state_dict())


def test_models_can_still_be_pickled_and_copied():
    model = vim(img_size=64)
    for twin in (pickle.loads(pickle.dumps(model)), copy.deepcopy(model)):
        twin.load_state_dict(vim(img_size=96).state_dict())


def test_whole_classifiers_get_the_names_of_mmpretrain():
    from mmpretrain.registry import MODELS

    classifier = MODELS.build(
        dict(
            type='ImageClassifier',
            _scope_='mmpretrain',
            backbone=dict(type='mmvim.VisionMamba', arch=SMALL),
            head=dict(type='LinearClsHead', num_classes=10, in_channels=32),
        )
    )
    published = {**vim().state_dict(), 'head.weight': torch.randn(10, 32), 'head.bias': torch.randn(10)}
    classifier.load_state_dict(to_classifier(published), strict=True)
    assert torch.equal(classifier.head.fc.weight, published['head.weight'])
