"""Backbones by name, config or class, as tools/benchmark.py measures them."""

import re
from copy import deepcopy
from pathlib import Path
from tempfile import TemporaryDirectory

import torch
from mmengine.config import Config, DictAction
from mmengine.registry import MODELS, init_default_scope
from torch import nn

import mmvim.registry  # noqa: F401
from mmvim.compat.lookup import HOSTS
from mmvim.compat.types import kind_of
from mmvim.config.completion import complete_config
from mmvim.config.reading import read_config
from mmvim.errors import ConfigError, InputError, first_line


def _plain(kind: str, **options) -> dict:
    return dict(type=f'mmvim.{kind}', out_type='featmap', **options)


def named_models() -> dict[str, dict]:
    """Backbones by name, as dense predictors: plain ones give the last map, hierarchical ones four maps."""
    models = {}
    for size in ('tiny', 'small', 'base'):
        models[f'vim-{size}'] = _plain('VisionMamba', arch=size, cls_token=None)
        models[f'deit-{size}'] = _plain('VisionTransformer', arch=f'deit-{size}', with_cls_token=False)
        models[f'vitdet-{size}'] = models[f'deit-{size}'] | dict(window_size=14, global_attn_indexes=(2, 5, 8, 11))
        models[f'hier-vim-{size}'] = dict(type='mmvim.HierVim', arch=size, out_indices=(0, 1, 2, 3))
    for size in ('tiny', 'tiny2', 'small', 'base', 'large', 'large2', 'large3'):
        models[f'mambavision-{size}'] = dict(type='mmvim.MambaVision', arch=size, out_indices=(0, 1, 2, 3))
    return models


def _is_registered(name: str) -> bool:
    """Whether this is 'scope.Type' of a host's registry, or 'timm.name' of a model of timm."""
    scope, _, kind = name.partition('.')
    if scope == 'timm':
        try:
            import timm
        except ImportError as error:
            raise ConfigError(f'{name}: timm is not installed (pip install timm)') from error
        return timm.is_model(kind)
    if scope not in (*HOSTS, 'mmvim') or not kind:
        return False
    return MODELS.get(name) is not None


def model_config(spec: str, attention: str) -> tuple[str, dict, dict | list | None, str | None]:
    """What a model's name or config file stands for.

    Args:
        spec: a name of ``named_models``, with options behind a colon ('deit-tiny:attention=materialized'), a backbone
            of a host or of timm with its options ('mmdet.ResNet:depth=50,out_indices=(2,3)'), or the path of a config,
            also one of a host ('mmdet::retinanet/retinanet_r50_fpn_1x_coco.py').
        attention: 'sdpa' or 'materialized', for models that have the choice and do not name it.

    Returns:
        Label, backbone config, neck config (None: the default one), default scope.

    Raises:
        ConfigError: if there is no such model.
    """
    name, *options = re.split('(?<!:):(?!:)', spec, maxsplit=1)
    if name.endswith('.py'):
        backbone, neck, scope = _parts_of_config(name)
        label = ':'.join([Path(name).stem, *options])
    elif name in named_models():
        backbone, neck, scope, label = named_models()[name], None, None, spec
    elif '::' not in name and _is_registered(name):
        backbone, neck, scope, label = dict(type=name), None, None, spec
    else:
        raise ConfigError(
            f"unknown model '{spec}': give the path of a config (.py), a host's config "
            f"(mmdet::retinanet/retinanet_r50_fpn_1x_coco.py), a host's backbone (mmdet.ResNet:depth=50), one of timm "
            f'(timm.convnext_tiny), or one of {", ".join(named_models())}'
        )
    backbone |= _options(spec, *options)
    backbone.pop('init_cfg', None)
    if _is_ours(backbone, 'VisionTransformer') and 'attention' not in backbone:
        backbone['attention'] = attention
        label = f'{label} ({attention})'
    return label, backbone, neck, scope


def _parts_of_config(path: str) -> tuple[dict, dict | list | None, str | None]:
    """Backbone, neck and default scope of a config file; a neck that only averages does not count."""
    if '::' in path:
        try:
            with TemporaryDirectory() as folder:
                child = Path(folder, 'child.py')
                child.write_text(f'_base_ = {path!r}')
                cfg = Config.fromfile(child)
        except Exception as error:
            raise ConfigError(f"config '{path}' cannot be read: {first_line(error)}; check host and path") from error
    else:
        cfg = read_config(path)
    try:
        complete_config(cfg)
    except InputError:  # classes or data are missing, which the backbone does not need
        pass
    model = cfg.get('model') or {}
    if not kind_of(model.get('backbone') or {}):
        raise ConfigError(f'{path}: its model has no backbone to measure')
    neck = model.get('neck')
    if isinstance(neck, dict) and kind_of(neck) == 'GlobalAveragePooling':
        neck = None
    return dict(model.backbone), neck, cfg.get('default_scope')


def _options(spec: str, text: str = '') -> dict:
    """KEY=VALUE,KEY=VALUE as a dict; values may have commas of their own."""
    found = {}
    for option in re.split(r',(?=\w+=)', text) if text else ():
        key, equals, value = option.partition('=')
        if not key or not equals:
            raise ConfigError(f"model '{spec}': '{option}' is not KEY=VALUE, such as mmdet.ResNet:depth=50")
        if any(value.count(left) != value.count(right) for left, right in ('()', '[]')):
            raise ConfigError(f"model '{spec}': the brackets of '{option}' do not match")
        found[key] = DictAction._parse_iterable(value)
    if isinstance(found.get('out_indices'), int):
        found['out_indices'] = (found['out_indices'],)
    return found


def _is_ours(backbone: dict, *kinds: str) -> bool:
    kind = backbone['type']
    return (kind if isinstance(kind, str) else kind.__module__).startswith('mmvim.') and kind_of(backbone) in kinds


def _timm_model(name: str, resolution: int, maps: bool, options: dict) -> nn.Module:
    """A model of timm without its classifier; for a pyramid the maps that it offers as features."""
    import timm

    options = dict(options, pretrained=False)
    options |= dict(features_only=True) if maps else dict(num_classes=0)
    try:
        model = timm.create_model(name, img_size=resolution, **options)
    except TypeError:  # models of any size know no img_size
        model = timm.create_model(name, **options)
    if maps:
        model.out_channels = model.feature_info.channels()
    return model


def build(backbone: dict, neck: dict | list | None, scope: str | None, fpn: bool, resolution: int) -> nn.Module:
    """The backbone for images of this side, with its pyramid if asked.

    Raises:
        InputError: if the model cannot be built, or not for this resolution.
        MemoryError, RuntimeError: if there is not enough memory for it.
    """
    init_default_scope(scope or 'mmengine')
    backbone, name = deepcopy(backbone), kind_of(backbone)
    if _is_ours(backbone, 'VisionMamba', 'VisionTransformer'):
        backbone['img_size'] = resolution
    try:
        torch.manual_seed(0)
        if str(backbone['type']).startswith('timm.'):
            model = _timm_model(backbone.pop('type').removeprefix('timm.'), resolution, fpn, backbone)
        else:
            model = MODELS.build(backbone)
        if not fpn:
            return model
        if neck is None:
            channels = _channels(model, resolution)
            if len(channels) == 1:
                neck = dict(type='mmvim.SimpleFPN', in_channels=channels[0], out_channels=256, num_outs=5)
            else:
                neck = dict(type='mmdet.FPN', in_channels=channels, out_channels=256, num_outs=5)
        return nn.Sequential(model, MODELS.build(deepcopy(neck)))
    except Exception as error:
        if out_of_memory(error):
            raise
        with_neck = ' with a pyramid' * fpn
        raise InputError(f'{name}{with_neck} at {resolution} px cannot be built: {first_line(error)}') from error


@torch.inference_mode()
def _channels(model: nn.Module, resolution: int) -> list[int]:
    """Channels of each map; a backbone that does not say so is run on an image."""
    if hasattr(model, 'out_channels'):
        return list(model.out_channels)
    model.eval()  # returns nothing in some backbones of hosts
    return [y.shape[1] for y in model(torch.randn(1, 3, resolution, resolution))]


def out_of_memory(error: Exception) -> bool:
    """Whether the allocator of a CPU or GPU gave up."""
    text = str(error)
    return isinstance(error, MemoryError) or 'out of memory' in text or "can't allocate memory" in text
