"""Parameters and floating-point operations of models: what tools/get_flops.py shows."""

from __future__ import annotations

import argparse
import json
from collections.abc import Callable, Iterator, Sequence
from copy import deepcopy
from pathlib import Path

from mmengine.config import Config
from mmengine.model import revert_sync_batchnorm
from mmengine.registry import MODELS, init_default_scope
from torch import nn

import mmvim.registry  # noqa: F401
from mmvim.compat.types import kind_of
from mmvim.config.completion import complete_config
from mmvim.config.data import dataset_of
from mmvim.config.reading import read_config
from mmvim.errors import ConfigError, DataError
from mmvim.tables import table
from mmvim.tools.command_line import add_cfg_options, new_parser
from mmvim.tools.flop_counter import KINDS, Cost, count

TRAINING_ONLY = ('auxiliary_head',)


def parser() -> argparse.ArgumentParser:
    """Arguments of tools/get_flops.py."""
    parser = new_parser(
        'Parameters and floating-point operations of a detector, segmentor or classifier. Nothing is '
        'computed and no weights are needed.'
    )
    add = parser.add_argument
    add('config', help='config file, also one of mmvim such as vim/vim-ti_8xb128_in1k.py')
    add(
        '--shape',
        type=int,
        nargs='+',
        metavar='SIDE',
        help="height and width of the image, or one number for both; the config's own size if not given",
    )
    add('--sizes', type=int, nargs='+', metavar='SIDE', help='show also how the cost grows over these square images')
    add('--json', metavar='FILE', help='write everything to this file too')
    add_cfg_options(parser, 'settings that replace those of the config, such as model.backbone.arch=small')
    return parser


def main(args: argparse.Namespace) -> None:
    """Carry out tools/get_flops.py."""
    shape, sizes = _shape(args.shape), [_shape([size], '--sizes') for size in args.sizes or ()]
    cfg = read_config(args.config, args.cfg_options)
    _complete(cfg)
    build = builder(cfg)
    source = '--shape'
    if shape is None:
        shape, source = default_shape(cfg)
    cost, *costs = count(build, [padded(cfg, size) for size in (shape, *sizes)])
    padding = '' if cost.shape == shape else f', padded to {_by(cost.shape)}'
    print(f'{args.config}: one image of {_by(shape)} pixels ({source}){padding}\n')
    print(describe(cost))
    found = dict(config=args.config, counting=KINDS, **as_dict(cost))
    if sizes:
        print('\n' + growth(costs))
        found['sizes'] = [as_dict(each) for each in costs]
    if args.json:
        path = Path(args.json)
        try:
            path.write_text(json.dumps(found, indent=1) + '\n')
        except OSError as error:
            raise ConfigError(f'--json {path}: {error.strerror}; name a file in a folder that exists') from error
        print(f'\nfull results: {path}')


def _shape(sides: Sequence[int] | None, name: str = '--shape') -> tuple[int, int] | None:
    if sides is None:
        return None
    if len(sides) > 2:
        raise ConfigError(f'{name} {" ".join(map(str, sides))}: give height and width, or one number for both')
    if min(sides) < 1:
        raise ConfigError(f'{name}: {min(sides)} is not positive')
    return sides[0], sides[-1]


def _complete(cfg: Config) -> None:
    """Fill in what follows from the data; without the data the number of classes stays as it is."""
    if 'model' not in cfg:
        raise ConfigError(f"config '{cfg.filename}' has no model")
    try:
        complete_config(cfg)
    except DataError as error:
        number = next(_class_counts(cfg.model), 1)
        print(f'{error}\nassuming {number} classes\n')
        cfg.classes = [str(i) for i in range(number)]
        complete_config(cfg)


def _class_counts(model: object) -> Iterator[int]:
    for key, value in model.items() if isinstance(model, dict) else enumerate(model) if isinstance(model, list) else ():
        if key == 'num_classes':
            yield value
        elif key != 'rpn_head':
            yield from _class_counts(value)


def builder(cfg: Config) -> Callable[[], nn.Module]:
    """What makes the config's model, without loading or drawing weights."""
    init_default_scope(cfg.get('default_scope') or 'mmengine')
    return lambda: revert_sync_batchnorm(MODELS.build(deepcopy(cfg.model)))


def default_shape(cfg: Config) -> tuple[tuple[int, int], str]:
    """Height and width of a config's images, and which of its settings says so.

    Raises:
        ConfigError: if none does.
    """
    preprocessor, backbone = cfg.model.get('data_preprocessor') or {}, cfg.model.get('backbone') or {}

    def steps(split: str, kind: str, key: str) -> list[object]:
        pipeline = dataset_of(cfg.get(f'{split}_dataloader')).get('pipeline') or []
        return [step.get(key) for step in pipeline if kind_of(step) == kind]

    settings = {
        'CenterCrop of the test pipeline': steps('test', 'CenterCrop', 'crop_size'),
        'padding of data_preprocessor': [step.get('size') for step in preprocessor.get('batch_augments') or ()],
        'data_preprocessor.size': [preprocessor.get('size')],
        'backbone.img_size': [backbone.get('img_size')],
        'Resize of the test pipeline': [_turned(scale) for scale in steps('test', 'Resize', 'scale')],
        'RandomCrop of the train pipeline': steps('train', 'RandomCrop', 'crop_size'),
    }
    for source, value in ((source, value) for source, values in settings.items() for value in values):
        if isinstance(value, int):
            return (value, value), source
        if isinstance(value, list | tuple) and len(value) == 2 and all(isinstance(side, int) for side in value):
            return (value[0], value[1]), source
    raise ConfigError(f"config '{cfg.filename}' does not say how large its images are: give --shape HEIGHT WIDTH")


def padded(cfg: Config, shape: tuple[int, int]) -> tuple[int, int]:
    """Shape that the config's preprocessor hands to the model."""
    divisor = (cfg.model.get('data_preprocessor') or {}).get('pad_size_divisor') or 1
    height, width = (-(-side // divisor) * divisor for side in shape)
    return height, width


def _turned(scale: object) -> object:
    """Width and height as height and width."""
    return tuple(scale)[::-1] if isinstance(scale, list | tuple) else scale


def describe(cost: Cost) -> str:
    """Two tables, by part and by kind, and what was counted."""
    used = [name for name in cost.flops if name not in TRAINING_ONLY]
    rows = [(name, _millions(cost.params.get(name, 0)), _giga(cost.flops[name].total())) for name in used]
    rows.append(('total', _millions(sum(cost.params.get(name, 0) for name in used)), _giga(cost.total)))
    lines = [table(('part', 'parameters, M', 'FLOPs, G'), rows), '']
    kinds = cost.kinds
    rows = [(kind, _giga(kinds[kind]), f'{kinds[kind] / cost.total:.1%}') for kind in KINDS if kinds[kind]]
    rows.append(('linear and convolution', _giga(cost.published), f'{cost.published / cost.total:.1%}'))
    lines += [table(('operators', 'FLOPs, G', 'share'), rows), '']
    lines += ['One multiply-add is one FLOP, as in published figures. Counted are:']
    lines += [f'  {kind}: {text}' for kind, text in KINDS.items() if kinds[kind]]
    lines += [
        'Activations, additions, other elementwise products and the selection of boxes are not counted. Papers differ:',
        'where they leave out scan, attention and norm, compare with "linear and convolution".',
    ]
    if cost.rois:
        proposals, masks = cost.rois
        text = f'The second stage is counted for the largest number that a test allows: {proposals} proposals'
        lines.append(text + (f' and {masks} masks.' if masks else '.'))
    left = {name: cost.params[name] for name in TRAINING_ONLY if name in cost.params}
    lines += [f'{name} ({_millions(number)} M parameters) is for training only.' for name, number in left.items()]
    if not cost.fake:
        lines.append('This model was run on random values, because its control flow depends on values.')
    return '\n'.join(lines)


def growth(costs: Sequence[Cost]) -> str:
    """How the cost grows with the image, in all and by token."""
    header = ['size', 'tokens', 'parameters, M', 'FLOPs, G', 'backbone, G', 'scan, G']
    header += ['scan per token, M', 'attention per token, M']
    rows = []
    for cost in costs:
        kinds, tokens = cost.kinds, cost.tokens
        per_token = [f'{kinds[kind] / tokens / 1e6:.3f}' if tokens else '-' for kind in ('scan', 'attention')]
        params = sum(number for name, number in cost.params.items() if name not in TRAINING_ONLY)
        backbone = _giga(cost.flops['backbone'].total()) if 'backbone' in cost.flops else '-'
        rows.append(
            (_by(cost.shape), tokens, _millions(params), _giga(cost.total), backbone, _giga(kinds['scan']), *per_token)
        )
    note = 'Tokens are those of the largest scan or attention, with class token, windows and their padding.'
    return table(header, rows) + '\n' + note


def as_dict(cost: Cost) -> dict:
    """What is known about a cost, for JSON; FLOPs and parameters in ones."""
    kinds = cost.kinds
    found = dict(
        shape=list(cost.shape),
        params=cost.params,
        flops={name: dict(part) for name, part in cost.flops.items()},
        flops_by_kind=dict(kinds),
        flops_total=cost.total,
        flops_linear_and_convolution=cost.published,
        tokens=cost.tokens,
    )
    if cost.tokens:
        found |= {f'{kind}_flops_per_token': kinds[kind] / cost.tokens for kind in ('scan', 'attention')}
    if cost.rois:
        found |= dict(proposals=cost.rois[0], masks=cost.rois[1])
    return found


def _by(shape: tuple[int, int]) -> str:
    return f'{shape[0]}x{shape[1]}'


def _giga(number: int) -> str:
    return f'{number / 1e9:.3f}'


def _millions(number: int) -> str:
    return f'{number / 1e6:.2f}'
