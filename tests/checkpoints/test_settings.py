"""Settings that neither names nor shapes of weights tell: saved with them, and compared in every way to load."""

import argparse
import inspect
from collections import OrderedDict
from pathlib import Path

import pytest
import torch
from mmengine.config import Config
from mmengine.logging import MMLogger
from mmengine.model import BaseModel, ExponentialMovingAverage
from mmengine.runner.checkpoint import get_state_dict, load_checkpoint, save_checkpoint, weights_to_cpu
from safetensors.torch import save_file
from torch import nn
from torch.optim.swa_utils import AveragedModel

from mmvim.checkpoints import deit, hier_vim, mambavision, vim
from mmvim.errors import CheckpointError
from mmvim.models import HierVim, MambaVision, VisionMamba, VisionTransformer
from mmvim.models.identify import identify
from mmvim.registry import MODELS
from mmvim.weights.reading import read_state_dict

REPOSITORY = Path(__file__).parents[2]
VIM = dict(arch=dict(embed_dims=32, depth=4, d_state=4), img_size=64)
DENSE_VIM = dict(VIM, cls_token=None, out_type='featmap', out_indices=(1, 3))
DEIT = dict(arch=dict(embed_dims=32, depth=4, num_heads=2), img_size=64)
DENSE_DEIT = dict(DEIT, with_cls_token=False, out_type='featmap', out_indices=(1, 3))
MAMBAVISION = dict(
    arch=dict(embed_dims=16, stem_channels=8, depths=(1, 1, 3, 2), num_heads=(1, 2, 2, 4)), window_sizes=(8, 8, 4, 2)
)
HIER_VIM = dict(arch=dict(embed_dims=8, depths=(1, 1, 2, 1)))

# setting -> arguments of a model that is saved, and those that another one of its weights has
ROWS = {
    VisionMamba: {
        'directions': (dict(VIM, directions='none'), dict(directions='block')),
        'divide_output': (VIM, dict(divide_output=False)),
        'rotary': (DENSE_VIM, dict(rotary='both')),
        'rotary_pretrain_size': (dict(DENSE_VIM, rotary='hidden'), dict(rotary_pretrain_size=7)),
        'cls_token': (VIM, dict(cls_token='head')),
        'patch_stride': (VIM, dict(patch_stride=8, img_size=40)),
        'out_type': (VIM, dict(out_type='avg_featmap')),
        'out_indices': (DENSE_VIM, dict(out_indices=(2, 3))),
        'feature_source': (DENSE_VIM, dict(feature_source='residual')),
        'final_norm': (dict(DENSE_VIM, final_norm=True), dict(final_norm=False)),
        'norm_eps': (VIM, dict(norm_eps=1e-2)),
        'interpolate_mode': (dict(DENSE_VIM, feature_source='residual'), dict(interpolate_mode='area')),
    },
    VisionTransformer: {
        'num_heads': (DEIT, dict(arch=dict(DEIT['arch'], num_heads=4))),
        'window_size': (DENSE_DEIT, dict(window_size=2)),
        'global_attn_indexes': (dict(DENSE_DEIT, window_size=2), dict(global_attn_indexes=(1,))),
        'with_cls_token': (dict(DEIT, out_type='avg_featmap'), dict(with_cls_token=False)),
        'out_type': (DEIT, dict(out_type='avg_featmap')),
        'out_indices': (DENSE_DEIT, dict(out_indices=(2, 3))),
        'final_norm': (dict(DENSE_DEIT, final_norm=True), dict(final_norm=False)),
        'norm_eps': (DEIT, dict(norm_eps=1e-2)),
        'interpolate_mode': (DEIT, dict(interpolate_mode='area')),
    },
    MambaVision: {
        'mixer_conv': (MAMBAVISION, dict(mixer_conv='causal')),
        'num_heads': (MAMBAVISION, dict(arch=dict(MAMBAVISION['arch'], num_heads=(1, 2, 4, 8)))),
        'fit_windows': (MAMBAVISION, dict(fit_windows=True)),
        'window_sizes': (MAMBAVISION, dict(window_sizes=(8, 8, 3, 2))),
        'out_indices': (MAMBAVISION, dict(out_indices=(1, 2, 3))),
    },
    HierVim: {
        'divide_output': (HIER_VIM, dict(divide_output=False)),
        'out_indices': (dict(HIER_VIM, out_type='raw'), dict(out_indices=(1, 2, 3))),
    },
}
TABLES = {
    VisionMamba: vim.HIDDEN_SETTINGS,
    VisionTransformer: deit.HIDDEN_SETTINGS,
    MambaVision: mambavision.HIDDEN_SETTINGS,
    HierVim: hier_vim.HIDDEN_SETTINGS,
}
EVERY_ROW = [(cls, name) for cls, rows in ROWS.items() for name in rows]

# all other arguments: of those that show in names or shapes another value, and of those that change no results too
SHOWN = {
    VisionMamba: (VIM, dict(arch='tiny', img_size=96, patch_size=8, in_channels=1, layer_scale_init=0.1)),
    VisionTransformer: (DEIT, dict(arch='deit-tiny', img_size=96, patch_size=8, in_channels=1)),
    MambaVision: (
        MAMBAVISION,
        dict(arch='tiny', in_channels=1, out_type='raw', attention='early', mixer_symmetric=False, mixer_merge='gate'),
    ),
    HierVim: (HIER_VIM, dict(arch='tiny', in_channels=1, patch_size=8, directions='v1')),
}
WITHOUT_EFFECT = {
    VisionMamba: (
        dict(VIM, directions='sequence'),
        dict(
            reverse_prob=0.9,
            drop_rate=0.5,
            drop_path_rate=0.5,
            frozen_stages=1,
            with_cp=True,
            scan_backend='torch',
        ),
    ),
    VisionTransformer: (
        DEIT,
        dict(
            attention='materialized',
            drop_rate=0.5,
            drop_path_rate=0.5,
            frozen_stages=1,
            with_cp=True,
        ),
    ),
    MambaVision: (
        MAMBAVISION,
        dict(dt_init='mamba', drop_path_rate=0.5, frozen_stages=1, norm_eval=True, with_cp=True, scan_backend='torch'),
    ),
    HierVim: (HIER_VIM, dict(drop_path_rate=0.5, frozen_stages=1, with_cp=True, scan_backend='torch')),
}
# 'avg_featmap' is the mean of 'featmap', and 'raw' has no norms
READ_OUT = {HierVim: {'out_type'}}


def build(cls, settings):
    torch.manual_seed(0)
    model = cls(**settings)
    for parameter in model.parameters():
        nn.init.normal_(parameter, std=0.1)
    return model.eval()


def pair(cls, name):
    saved, other = ROWS[cls][name]
    return build(cls, saved), cls(**{**saved, **other}).eval()


@pytest.fixture
def warnings(monkeypatch, caplog):
    """The warnings that were logged since the last call."""
    logger = MMLogger.get_current_instance()
    monkeypatch.setattr(logger, 'handlers', [*logger.handlers, caplog.handler])

    def take():
        found = [r.getMessage() for r in caplog.records if r.levelname == 'WARNING' and 'check the settings' in r.msg]
        caplog.clear()
        return found

    return take


def outputs(model):
    with torch.no_grad():
        return model(torch.randn(1, 3, 64, 80, generator=torch.Generator().manual_seed(1)))


def equal(one, other):
    return len(one) == len(other) and all(
        a.shape == b.shape and torch.allclose(a, b, rtol=1e-4, atol=1e-5) for a, b in zip(one, other, strict=True)
    )


# ---- the tables are complete


@pytest.mark.parametrize('cls', TABLES)
def test_every_argument_is_in_the_table_or_known_to_need_no_row(cls):
    rows = {row.name for row in TABLES[cls]}
    assert rows == set(ROWS[cls])
    in_arch = {row.name for row in TABLES[cls] if row.in_arch}
    arguments = set(inspect.signature(cls).parameters) - {'init_cfg'}
    others = set(SHOWN[cls][1]) | set(WITHOUT_EFFECT[cls][1]) | READ_OUT.get(cls, set())
    assert arguments == (rows - in_arch) | others and not rows & others


@pytest.mark.parametrize('cls, name', EVERY_ROW)
def test_a_setting_in_the_table_changes_results_but_no_weights(cls, name):
    saved, other = pair(cls, name)
    other.load_state_dict(saved.state_dict(), strict=False)
    report = other.load_report
    assert not (report.missing or report.unexpected or report.mismatched)
    assert not equal(outputs(saved), outputs(other))


@pytest.mark.parametrize('cls, name', [(cls, name) for cls, (_, others) in SHOWN.items() for name in others])
def test_an_argument_that_needs_no_row_shows_in_the_weights(cls, name):
    settings, others = SHOWN[cls]
    with torch.device('meta'):
        one, other = (cls(**{**settings, **more}).state_dict() for more in ({}, {name: others[name]}))
    assert {key: value.shape for key, value in one.items()} != {key: value.shape for key, value in other.items()}


@pytest.mark.parametrize('cls, name', [(cls, name) for cls, (_, others) in WITHOUT_EFFECT.items() for name in others])
def test_an_argument_without_effect_is_not_told(cls, name, warnings):
    settings, others = WITHOUT_EFFECT[cls]
    saved, other = build(cls, settings), cls(**{**settings, name: others[name]}).eval()
    other.load_state_dict(saved.state_dict())
    assert equal(outputs(saved), outputs(other)) and not warnings()


# ---- every way to save and to load


class Detector(BaseModel):
    def __init__(self, backbone):
        super().__init__()
        self.backbone = backbone

    def forward(self, inputs):
        return self.backbone(inputs)


def save_backbone(model, path):
    torch.save(model.state_dict(), path)


def save_whole(model, path):
    """As a runner saves."""
    save_checkpoint({'state_dict': weights_to_cpu(get_state_dict(Detector(model))), 'meta': {}}, str(path))


def save_average(model, path):
    """As a runner with EMAHook saves: the averaged weights under the names of the model."""
    whole = Detector(model)
    average = ExponentialMovingAverage(whole, update_buffers=True)
    checkpoint = {'state_dict': weights_to_cpu(get_state_dict(whole)), 'ema_state_dict': average.state_dict()}
    for key, value in checkpoint['ema_state_dict'].items():
        if key.startswith('module.'):
            checkpoint['state_dict'][key.removeprefix('module.')] = value
    save_checkpoint(checkpoint, str(path))


def save_wrapped(model, path):
    torch.save({'model': nn.ModuleDict(dict(module=Detector(model))).state_dict()}, path)


def init_cfg(model, path):
    model.init_cfg = dict(type='Pretrained', checkpoint=str(path))
    model.init_weights()


def init_cfg_with_prefix(model, path):
    model.init_cfg = dict(type='Pretrained', checkpoint=str(path), prefix='backbone.')
    model.init_weights()


def load_from(model, path):
    load_checkpoint(Detector(model), str(path), map_location='cpu')


WAYS = [
    (save_whole, init_cfg),
    (save_average, load_from),
    # python -m pytest tests/checkpoints -m slow
    pytest.param(save_backbone, init_cfg, marks=pytest.mark.slow),
    pytest.param(save_whole, init_cfg_with_prefix, marks=pytest.mark.slow),
    pytest.param(save_whole, load_from, marks=pytest.mark.slow),
    pytest.param(save_wrapped, init_cfg, marks=pytest.mark.slow),
    pytest.param(save_wrapped, load_from, marks=pytest.mark.slow),
]


@pytest.mark.parametrize('save, load', WAYS)
@pytest.mark.parametrize('cls, name', EVERY_ROW)
def test_a_setting_of_a_file_is_compared(cls, name, save, load, tmp_path, warnings):
    saved, other = pair(cls, name)
    save(saved, tmp_path / 'own.pth')
    row = next(row for row in TABLES[cls] if row.name == name)
    load(cls(**ROWS[cls][name][0]), tmp_path / 'own.pth')
    assert not warnings()
    if row.refused:
        with pytest.raises(
            CheckpointError, match=rf"own.pth' was trained with other settings .*: {name}=.*: set {name}="
        ):
            load(other, tmp_path / 'own.pth')
        return
    load(other, tmp_path / 'own.pth')
    (message,) = warnings()
    assert f'{name}=' in message and f': set {name}=' in message and "own.pth'" in message
    assert message.count(' in the file') == 1, 'nothing else differs'


@pytest.mark.parametrize('cls, name', EVERY_ROW)
def test_a_plain_load_state_dict_warns_of_every_setting(cls, name, warnings):
    saved, other = pair(cls, name)
    other.load_state_dict(saved.state_dict(), strict=False)
    (message,) = warnings()
    assert f': set {name}=' in message


def test_the_average_of_a_model_is_compared_with_it(warnings):
    saved, other = pair(VisionMamba, 'rotary')
    average, other = ExponentialMovingAverage(Detector(saved)), ExponentialMovingAverage(Detector(other))
    other.load_state_dict(average.state_dict())
    assert 'set rotary=None' in warnings()[0]


@pytest.mark.parametrize('wrap, load', [(Detector, init_cfg), (Detector, load_from), (None, init_cfg)])
@pytest.mark.parametrize('key', ['state_dict_ema', 'state_dict'])
@pytest.mark.parametrize('average', [ExponentialMovingAverage, AveragedModel])
def test_a_file_of_an_average_keeps_its_settings(wrap, average, key, load, tmp_path, warnings):
    saved, other = pair(VisionMamba, 'rotary')
    torch.save({key: average(saved if wrap is None else wrap(saved)).state_dict()}, tmp_path / 'own.pth')
    load(VisionMamba(**DENSE_VIM), tmp_path / 'own.pth')
    assert not warnings()
    load(other, tmp_path / 'own.pth')
    (message,) = warnings()
    assert "rotary=None in the file, 'both' in the model" in message
    with pytest.raises(CheckpointError, match='divide_output=True in the file, False in the model'):
        load(VisionMamba(**DENSE_VIM, divide_output=False), tmp_path / 'own.pth')


@pytest.mark.parametrize(
    'cls, saved, other',
    [
        (VisionMamba, VIM, dict(DENSE_VIM, feature_source='residual', img_size=96)),
        (VisionMamba, VIM, dict(VIM, img_size=128)),
        (VisionMamba, VIM, dict(VIM, patch_stride=8)),  # long-sequence fine-tuning
        (VisionMamba, dict(VIM, directions='sequence'), dict(VIM, directions='none')),
        (VisionTransformer, DEIT, dict(DENSE_DEIT, window_size=2, global_attn_indexes=(1, 3))),
        (MambaVision, dict(MAMBAVISION, out_type='avg_featmap'), dict(MAMBAVISION, window_sizes=(8, 8, 8, 4))),
        (HierVim, dict(HIER_VIM, out_type='avg_featmap'), HIER_VIM),
    ],
)
def test_what_fine_tuning_changes_on_purpose_is_not_told(cls, saved, other, tmp_path, warnings):
    save_backbone(build(cls, saved), tmp_path / 'own.pth')
    init_cfg(cls(**other), tmp_path / 'own.pth')
    assert not warnings()


def test_files_of_earlier_versions_have_fewer_settings(tmp_path, warnings):
    weights = build(VisionMamba, dict(VIM, cls_token='head')).state_dict()
    weights._metadata['']['mmvim'] = {'grid': (4, 4), 'cls_token': 'head'}
    torch.save(weights, tmp_path / 'own.pth')
    init_cfg(VisionMamba(**VIM, cls_token='head', rotary='both'), tmp_path / 'own.pth')
    assert not warnings()
    init_cfg(VisionMamba(**VIM), tmp_path / 'own.pth')
    assert "cls_token='head' in the file, 'middle' in the model" in warnings()[0]


# ---- published files

NAME = 'vim_tiny_patch16_224_bimambav2_final_pool_mean_abs_pos_embed'
LONG = NAME.replace('patch16', 'patch16_stride8')
PUBLISHED = dict(
    directions='v2',
    divide_output=True,
    rotary=None,
    cls_token='middle',
    patch_stride=16,
    out_type='cls_token',
    feature_source='residual',
    final_norm=True,
    norm_eps=1e-5,
)


@pytest.mark.parametrize(
    'name, settings',
    [
        (f'{NAME}_with_midclstok_div2', {}),
        (f'{LONG}_with_midclstok_div2', dict(patch_stride=8)),
        (f'{NAME}_with_middle_cls_token_div2'.replace('tiny', 'base'), {}),
        (f'{NAME}_with_noclstok_div2', dict(cls_token=None, out_type='avg_featmap')),
        (f'{NAME}_rope', dict(rotary='hidden', cls_token=None, out_type='avg_featmap', divide_output=False)),
        (f'{NAME}_rope_also_residual_with_cls_token', dict(rotary='both', cls_token='head', divide_output=False)),
        (f'{NAME}_with_midclstok_div2_and_more', None),
        (f'{NAME}_with_other_div2', None),
        (NAME.replace('bimambav2', 'bimamba2d') + '_with_midclstok_div2', None),
        ('deit_tiny_patch16_224', None),
        (None, None),
    ],
)
def test_settings_by_the_name_of_the_original_code(name, settings):
    assert vim.settings_of_name(name) == (None if settings is None else PUBLISHED | settings)


def small_file(path, *, rotary=False, name=None, prefix='', weights=None):
    """A file as the original training code writes it."""
    weights = dict(build(VisionMamba, VIM).state_dict() if weights is None else weights)
    weights |= {'head.weight': torch.ones(10, 32), 'head.bias': torch.ones(10)}
    if rotary:
        weights |= {'rope.freqs_cos': torch.ones(16, 32), 'rope.freqs_sin': torch.ones(16, 32)}
    args = argparse.Namespace(lr=1e-3, **({} if name is None else dict(model=name)))
    weights = {prefix + key: value for key, value in weights.items()}
    torch.save({'model': weights, 'epoch': 299, 'args': args}, path)
    return path


@pytest.mark.parametrize('in_model', [None, 'hidden', 'both'])
@pytest.mark.parametrize(
    'rotary, name, in_file',
    [
        (False, None, None),
        (False, f'{NAME}_with_midclstok_div2', None),
        (True, None, 'unknown'),
        (True, f'{NAME}_rope_with_cls_token_div2', 'hidden'),
        (True, f'{NAME}_rope_also_residual_with_cls_token_div2', 'both'),
    ],
)
def test_rotary_embedding_of_a_published_file(rotary, name, in_file, in_model, tmp_path, warnings):
    path = small_file(tmp_path / 'vim.pth', rotary=rotary, name=name)
    model = VisionMamba(**DENSE_VIM, rotary=in_model)
    init_cfg(model, path)
    found = warnings()
    expected = in_model if in_file == 'unknown' and in_model else 'both' if in_file == 'unknown' else in_file
    assert len(found) == (in_model != expected)
    if found:
        assert (
            f'rotary={expected!r} in the file (it has {"" if rotary else "no "}rope.freqs_cos), {in_model!r} in'
            in found[0]
        )
        assert f': set rotary={expected!r}.' in found[0]
    assert all(name in model.load_report.dropped for name in ('rope.freqs_cos', 'rope.freqs_sin') if rotary)
    # the same without a file's name, and without `args`
    model.load_state_dict(read_state_dict(path), strict=False)
    assert len(warnings()) == (in_model != expected)


def without_metadata(model):
    return dict(model.state_dict())


def as_safetensors(model, path):
    path = path.with_suffix('.safetensors')
    save_file(without_metadata(model), path)
    return path


def as_plain_dict(model, path):
    torch.save({'state_dict': without_metadata(model)}, path)
    return path


def with_a_head_of_the_host(model, path):
    torch.save({'state_dict': without_metadata(model) | {'head.layers.head.weight': torch.ones(10, 32)}}, path)
    return path


@pytest.mark.parametrize('save', [as_safetensors, as_plain_dict, with_a_head_of_the_host])
@pytest.mark.parametrize('settings', [VIM, DENSE_VIM])
@pytest.mark.parametrize('rotary', ['hidden', 'both', None])
def test_own_weights_without_metadata_are_taken_for_no_published_file(settings, rotary, save, tmp_path, warnings):
    model = build(VisionMamba, dict(settings, rotary=rotary))
    init_cfg(VisionMamba(**settings, rotary=rotary), save(model, tmp_path / 'own.pth'))
    found = warnings()
    assert len(found) == (rotary is not None)
    if found:
        assert f'does not tell whether it was trained with rotary embedding, and the model has {rotary=}' in found[0]
        assert ' in the file (' not in found[0] and 'set rotary' not in found[0]


def test_identified_weights_without_metadata_leave_rotary_embedding_open():
    model = build(VisionMamba, dict(VIM, rotary='both'))
    head = {'head.weight': torch.ones(10, 32)}
    for weights, rotary, noted in (
        (model.state_dict(), 'both', False),
        (without_metadata(model), None, True),
        (without_metadata(model) | head, None, False),
        (without_metadata(model) | {'rope.freqs_cos': torch.ones(16, 32)}, 'both', False),
    ):
        identity = identify(weights)
        assert identity.backbone['rotary'] == rotary
        assert any('does not tell whether it was trained with rotary' in note for note in identity.notes) == noted


def test_a_name_tells_of_rotary_embedding_whose_tables_were_left_out(tmp_path, warnings):
    path = small_file(tmp_path / 'vim.pth', name=f'{NAME}_rope_with_cls_token_div2')
    init_cfg(VisionMamba(**DENSE_VIM, rotary='hidden'), path)
    assert not warnings()
    init_cfg(VisionMamba(**DENSE_VIM), path)
    assert "rotary='hidden' in the file (by its args.model), None in the model" in warnings()[0]


def test_the_class_token_at_the_head_of_the_first_release_is_taken_out_there(tmp_path):
    weights = build(VisionMamba, VIM).state_dict()
    weights['pos_embed'] = torch.arange(17.0)[None, :, None].expand(1, 17, 32).clone()
    path = small_file(
        tmp_path / 'vim.pth', rotary=True, name=f'{NAME}_rope_also_residual_with_cls_token', weights=weights
    )
    model = VisionMamba(**DENSE_VIM, rotary='both', divide_output=False)
    init_cfg(model, path)
    assert model.pos_embed[0, :, 0].tolist() == list(range(1, 17))


@pytest.mark.parametrize(
    'settings, told',
    [
        (dict(divide_output=False), 'divide_output=True in the file (by its args.model), False in'),
        (dict(cls_token='head'), "cls_token='middle' in the file (by its args.model), 'head' in"),
        (dict(out_type='avg_featmap'), "out_type='cls_token' in the file (by its args.model), 'avg_featmap' in"),
        (dict(patch_stride=8, img_size=40), 'patch_stride=16 in the file (by its args.model), 8 in'),
        (dict(norm_eps=1e-6), 'norm_eps=1e-05 in the file (by its args.model), 1e-06 in'),
        (dict(feature_source='mixer'), "feature_source='residual' in the file (by its args.model), 'mixer' in"),
    ],
)
def test_a_classifier_is_compared_with_what_the_name_tells(settings, told, tmp_path, warnings):
    from mmpretrain import get_model

    path = small_file(tmp_path / 'vim.pth', name=f'{NAME}_with_midclstok_div2')
    head = dict(type='LinearClsHead', num_classes=10, in_channels=32)
    for more, expected in (({}, 0), (settings, 1)):
        backbone = dict(type='mmvim.VisionMamba', **{**VIM, **more})
        config = Config(dict(model=dict(type='ImageClassifier', backbone=backbone, head=head)))
        get_model(config, pretrained=str(path))
        found = warnings()
        assert len(found) == expected
    assert told in found[0] and found[0].count(' in the file') == 1


def test_a_name_that_is_not_known_is_named_and_not_guessed(tmp_path, warnings):
    init_cfg(VisionMamba(**VIM), small_file(tmp_path / 'vim.pth', name='vim_tiny_of_mine'))
    (message,) = warnings()
    assert "args.model='vim_tiny_of_mine' of the file is no name of the original code" in message
    assert ' in the file (' not in message


@pytest.mark.parametrize('key', ['model', 'state_dict'])
@pytest.mark.parametrize('prefix', ['', 'module.', 'backbone.'])
def test_the_name_is_read_wherever_the_weights_are(key, prefix, tmp_path, warnings):
    path = small_file(tmp_path / 'vim.pth', name=f'{NAME}_with_midclstok_div2', prefix=prefix)
    content = torch.load(path, weights_only=False)
    torch.save({key: OrderedDict(content['model']), 'args': content['args']}, path)
    init_cfg(VisionMamba(**VIM, divide_output=False), path)
    assert 'divide_output=True in the file (by its args.model)' in warnings()[0]


@pytest.mark.parametrize(
    'settings', [dict(mixer_conv='causal'), dict(arch=dict(MambaVision.arch_zoo['t'], num_heads=(1, 1, 2, 4)))]
)
def test_published_mambavision_files_have_known_settings(settings, warnings):
    with torch.device('meta'):
        weights = dict(MambaVision('tiny', out_type='avg_featmap').state_dict())
        same, other = MambaVision('tiny'), MambaVision(**{'arch': 'tiny', **settings})
    same.load_state_dict(weights, strict=False, assign=True)
    assert not warnings()
    other.load_state_dict(weights, strict=False, assign=True)
    assert '(as in all published ones)' in warnings()[0]


def test_published_deit_files_have_known_heads(warnings):
    with torch.device('meta'):
        weights = dict(VisionTransformer('deit-tiny').state_dict())
        same = VisionTransformer('deit-tiny')
        other = VisionTransformer(dict(VisionTransformer.arch_zoo['deit-tiny'], num_heads=6))
    same.load_state_dict(weights, assign=True)
    assert not warnings()
    other.load_state_dict(weights, assign=True)
    assert 'num_heads=3 in the file (as in all published ones), 6 in the model' in warnings()[0]


CLASSIFY_MAMBAVISION = dict(type='mmvim.MambaVision', arch='tiny', out_type='avg_featmap')
CLASSIFY_DEIT = dict(type='mmvim.VisionTransformer', arch='deit-tiny')


@pytest.mark.parametrize('whole', [False, pytest.param(True, marks=pytest.mark.slow)])
@pytest.mark.parametrize(
    'backbone, settings, told',
    [
        (CLASSIFY_MAMBAVISION, dict(window_sizes=(8, 8, 7, 7)), 'window_sizes=(8, 8, 14, 7)'),
        (CLASSIFY_MAMBAVISION, dict(window_sizes=(3, 3, 14, 7)), None),
        (CLASSIFY_MAMBAVISION, dict(fit_windows=True), 'fit_windows=False'),
        (CLASSIFY_MAMBAVISION, dict(out_type='raw', window_sizes=(8, 8, 64, 32), fit_windows=True), None),
        (CLASSIFY_DEIT, dict(norm_eps=1e-5), 'norm_eps=1e-06'),
        (CLASSIFY_DEIT, dict(out_type='avg_featmap'), "out_type='cls_token'"),
        (CLASSIFY_DEIT, dict(out_type='featmap', with_cls_token=False), None),
    ],
)
def test_published_classifiers_have_known_settings(backbone, settings, told, whole, tmp_path, warnings):
    weights = dict(MODELS.build(backbone).state_dict())
    weights |= {'head.weight': torch.ones(10, 8), 'head.bias': torch.ones(10)}
    torch.save({'model': weights}, tmp_path / 'file.pth')
    for more, expected in (({}, False), (settings, told is not None)):
        model = MODELS.build({**backbone, **more})
        if whole:
            model = Detector(model)
            model.head = nn.ModuleDict({'fc': nn.Linear(8, 10)})
            load_checkpoint(model, str(tmp_path / 'file.pth'), map_location='cpu')
        else:
            init_cfg(model, tmp_path / 'file.pth')
        found = warnings()
        assert len(found) == expected
    if told:
        assert f'{told} in the file (as in ' in found[0] and found[0].count(' in the file') == 1


@pytest.mark.parametrize('size', ['tiny', 'tiny2', 'small', 'base', 'large', 'large2', 'large3'])
def test_windows_of_published_mambavision_files_are_known_where_one_resolution_was_published(size, warnings):
    with torch.device('meta'):
        weights = MambaVision(size, out_type='avg_featmap').state_dict()
        other = MambaVision(size, out_type='avg_featmap', window_sizes=(8, 8, 32, 16))
    weights = dict(weights) | {'head.weight': torch.ones(10, 8)}
    other.load_state_dict(weights, strict=False, assign=True)
    assert [': set window_sizes=(8, 8, 14, 7)' in found for found in warnings()] == [True] * (
        size not in ('large2', 'large3')
    )
    del weights['head.weight']  # may be our own without metadata
    other.load_state_dict(weights, strict=False, assign=True)
    assert not warnings()


CONFIGS = [
    ('vim/cascade_mask_rcnn_vim_ti_coco.py', 'tiny', 'rotary'),
    ('vim/cascade_mask_rcnn_vim_ti_380k_coco.py', 'tiny', 'rotary'),
    ('vim/mask_rcnn_vim_ti_coco.py', 'tiny', 'rotary'),
    ('vim/cascade_mask_rcnn_vim_ti_folder.py', 'tiny', None),
    ('vim/cascade_mask_rcnn_vim_s_coco.py', 'small', 'rotary'),
    ('vim/upernet_vim-ti_8xb2-160k_ade20k-512x512.py', 'tiny', None),
    ('vim/upernet_vim-ti_8xb4-60k_ade20k-512x512.py', 'tiny', None),
    ('vim/upernet_vim-ti_folder.py', 'tiny', None),
    ('vim/upernet_vim-s_8xb2-160k_ade20k-512x512.py', 'small', 'rotary'),
    ('vim/upernet_vim-s_8xb4-60k_ade20k-512x512.py', 'small', 'rotary'),
    ('vim/vim-ti_8xb128_in1k.py', 'tiny', None),
    ('vim/vim-ti-stride8_8xb128-30e_in1k.py', 'tiny', None),
]


@pytest.mark.parametrize('config, size, differs', CONFIGS)
def test_a_published_file_in_the_configs_that_are_for_it(config, size, differs, published_vim, warnings):
    settings = Config.fromfile(REPOSITORY / 'configs' / config).model.backbone
    model = MODELS.build(settings)
    init_cfg(model, published_vim(size))
    assert model.load_report.fits
    found = warnings()
    assert len(found) == (differs is not None)
    if differs:
        assert "rotary=None in the file (it has no rope.freqs_cos), 'both' in the model" in found[0]
        assert f"vim_{size}.pth'" in found[0] and found[0].count(' in the file') == 1
