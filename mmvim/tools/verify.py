"""What `tools/verify_checkpoint.py` does."""

import argparse
import os
import re
import zipfile
from collections import OrderedDict
from collections.abc import Mapping
from pathlib import Path
from typing import cast

import torch
from mmengine.config import Config
from mmengine.registry import MODELS
from torch import Tensor, nn

from mmvim.config.completion import complete_config
from mmvim.config.reading import config_folders, read_config
from mmvim.errors import CheckpointError, ConfigError
from mmvim.machine import clock
from mmvim.models.identify import LONG_SEQUENCE, Identity, identify
from mmvim.tools.command_line import add_cfg_options, new_parser
from mmvim.tools.weights import backbone_weights, image_size, model_of
from mmvim.weights.fitting import Conversion, LoadReport, abridge, compare
from mmvim.weights.integrity import damaged_entries
from mmvim.weights.reading import WEIGHT_KEYS, find_state_dict, read_checkpoint

SUFFIXES = ('.pth', '.pt', '.tar', '.safetensors')
# folder of configs, and the sizes of the backbone's arch_zoo as the names of configs have them
CONFIGS = {
    'Vim': ('vim', dict(tiny='ti', small='s', base='b')),
    'MambaVision': (
        'mambavision',
        dict(tiny='t', tiny2='t2', small='s', base='b', large='l', large2='l2', large3='l3'),
    ),
    'HierVim': ('hier_vim', dict(tiny='t', small='s', base='b')),
    'DeiT': ('deit', {'deit-tiny': 'ti', 'deit-small': 's', 'deit-base': 'b'}),
}
TASKS = dict(classification='in1k', detection='rcnn', segmentation='upernet')
LONG = re.compile('stride8|long|patch8|s8')


def parser() -> argparse.ArgumentParser:
    """Arguments of tools/verify_checkpoint.py."""
    result = new_parser(
        'Report which model a checkpoint belongs to, which of its weights fit, which are dropped, interpolated or '
        'missing, whether a forward pass works, and which configs are for it. No code from the file is run.',
        'Ends with status 1 if a file does not fit',
    )
    result.add_argument('file', help=f'checkpoint, or a folder: all its files that end in {", ".join(SUFFIXES)}')
    result.add_argument('--config', help='fit the weights to the model of this config, not to one made for them')
    result.add_argument('--names', action='store_true', help='list all names, not only the first ones')
    result.add_argument('--no-forward', action='store_true', help='leave the forward pass out')
    add_cfg_options(result, 'settings that replace those of the config that --config names')
    result.add_argument('--device', choices=['cpu', 'cuda'], default='cpu', help='where the forward pass runs')
    return result


def main(args: argparse.Namespace) -> None:
    """Carry out tools/verify_checkpoint.py.

    Raises:
        CheckpointError: if a file is missing, damaged, of another model, or does not fit.
        ConfigError: if the config cannot be used.
    """
    if args.cfg_options and not args.config:
        raise ConfigError('--cfg-options changes the config that --config names: give one')
    if not os.path.isdir(args.file):
        _verify_file(args.file, args)
        return
    files = sorted(path for path in Path(args.file).iterdir() if path.is_file() and path.suffix in SUFFIXES)
    if not files:
        raise CheckpointError(f"folder '{args.file}' holds no file that ends in {', '.join(SUFFIXES)}")
    wrong = []
    for path in files:
        try:
            _verify_file(path, args)
        except CheckpointError as error:
            print(f'  PROBLEM: {error}')
            wrong.append(path.name)
        print()
    if wrong:
        raise CheckpointError(f"{len(wrong)} of {len(files)} files in '{args.file}' do not fit: {', '.join(wrong)}")


def _verify_file(path: str | os.PathLike, args: argparse.Namespace) -> None:
    """Print the report on one file.

    Raises:
        CheckpointError: if it cannot be read or does not fit; what is known until then has been printed.
    """
    print(f'{path}')
    checkpoint = read_checkpoint(path)
    print(f'  {describe_entries(checkpoint)}')
    print(f'  integrity: {describe_integrity(path, checkpoint)}')
    state_dict = find_state_dict(checkpoint, path)
    weights, others = backbone_weights(state_dict)
    identity = _identify(path, weights, args)
    if identity is None and not args.config:
        raise CheckpointError(
            f"'{path}' is of another model: its {len(state_dict)} weights ({abridge(state_dict)}) are none of Vim, "
            'MambaVision, HierVim and DeiT. If one of the configs is for it, name it with --config'
        )
    if identity is not None:
        name = f' {identity.size}' if identity.size else ', a size of its own'
        print(f'  model: {identity.family}{name}; {"; ".join(identity.facts)}')
        for note in identity.notes:
            print(f'  assumed: {note}')
    if args.config:
        cfg = read_config(args.config, args.cfg_options)
        complete_config(cfg)
        model = build_model(cfg)
        print(f'  fitted to {type(model.backbone).__name__} of {args.config}')
        backbone, size = model.backbone, image_size(model.backbone) or (224, 224)
        theirs = Conversion(OrderedDict((name, state_dict[name]) for name in others))
        ours = {name: value for name, value in model.state_dict().items() if not name.startswith('backbone.')}
        rest = compare(theirs, ours) if others else None
    else:
        backbone, size = MODELS.build(identity.backbone), identity.image_size
        rest = None
    report = load(backbone, weights)
    print_report(report, args.names)
    if rest is not None:
        print('  other parts of the model:')
        print_report(rest, args.names, '    ')
    elif others:
        parts = sorted({name.partition('.')[0] for name in others})
        print(f'  other parts, not checked without --config: {len(others)} weights of {", ".join(parts)}')
    problems = [r for r in (report, rest) if r is not None and not r.fits]
    if problems:
        raise CheckpointError(f"'{path}' does not fit {type(backbone).__name__}: {'; '.join(map(str, problems))}")
    if not args.no_forward:
        head = classifier_weights(state_dict, backbone)
        print(f'  forward pass: {forward(backbone.to(args.device), size, head)}')
    if identity is not None:
        print_configs(identity)


def _identify(path: str | os.PathLike, weights: Mapping[str, Tensor], args: argparse.Namespace) -> Identity | None:
    try:
        return identify(weights)
    except CheckpointError as error:
        if args.config:  # the config knows what the file does not say
            return None
        raise CheckpointError(f"'{path}': {error}") from None


def describe_entries(checkpoint: object) -> str:
    """What a file holds beside weights, as text."""
    if not isinstance(checkpoint, Mapping):
        return 'holds weights'
    entries = [str(name) for name, value in checkpoint.items() if not isinstance(value, Tensor)]
    if not entries:
        return f'holds {len(checkpoint)} weights'
    used = next((key for key in WEIGHT_KEYS if isinstance(checkpoint.get(key), Mapping)), None)
    more = [name for name in entries if name != used]
    words = f'weights are under {used!r}' if used else 'holds weights'
    if more:
        words += f', beside {abridge(more, 8)}'
    meta = checkpoint.get('meta')
    if isinstance(meta, Mapping):
        known = [
            f'{key} {meta[key]}' for key in ('experiment_name', 'epoch', 'iter', 'mmengine_version') if key in meta
        ]
        words += f'; saved by mmengine ({", ".join(known)})' if known else ''
    return words


def describe_integrity(path: str | os.PathLike, checkpoint: object) -> str:
    """What was compared with what was noted when the file was saved, as text.

    Raises:
        CheckpointError: if an entry differs.
    """
    damaged = damaged_entries(checkpoint)
    if damaged:
        raise CheckpointError(
            f"'{path}' is damaged: {', '.join(damaged)} differ from the digest that was saved with them; copy or "
            'download it again, or use an earlier checkpoint'
        )
    words = 'checksums of the file are right' if zipfile.is_zipfile(path) else 'the file has no checksums'
    return f'{words}, {"it has no digest" if damaged is None else "the digest of what it holds fits"}'


def build_model(cfg: Config) -> nn.Module:
    """The whole model of a config.

    Raises:
        ConfigError: if it has no backbone.
    """
    model = model_of(cfg)
    if 'data_preprocessor' not in model and cfg.get('data_preprocessor'):
        model.data_preprocessor = cfg.data_preprocessor  # as a runner does
    model.backbone.pop('init_cfg', None)
    return MODELS.build(model)


def load(backbone: nn.Module, weights: Mapping[str, Tensor]) -> LoadReport:
    """Load weights into a backbone as far as they fit, and report how they do.

    Raises:
        CheckpointError: if a weight has another shape, with the remedy; or if the position table fits no grid.
    """
    if not type(backbone).__module__.startswith('mmvim.'):  # of a host: no conversion
        state = backbone.state_dict()
        report = compare(Conversion(weights), state)
        backbone.load_state_dict({name: weights[name] for name in report.loaded}, strict=False)
        return report
    backbone.load_state_dict(weights, strict=False)
    return cast(LoadReport, backbone.load_report)


def print_report(report: LoadReport, all_names: bool, indent: str = '  ') -> None:
    """Print how weights fit, one line a kind."""
    shapes = [f'{name} {theirs} in the file, {ours} in the model' for name, (theirs, ours) in report.mismatched.items()]
    for what, names in (
        ('fit', report.loaded),
        ('dropped', report.dropped),
        ('interpolated', report.interpolated),
        ('missing', report.missing),
        ('unknown to the model', report.unexpected),
        ('of another shape', shapes),
    ):
        listed = abridge(names, len(names) if all_names else 4)
        print(f'{indent}{what}: {f"{len(names)} ({listed})" if names else "none"}')
    for setting in (*report.refused, *report.differing):
        print(f'{indent}setting: {setting}')


def classifier_weights(state_dict: Mapping[str, Tensor], backbone: nn.Module) -> tuple[Tensor, Tensor | None] | None:
    """Weight (classes, D) and bias of a classifier head that fits the backbone's output, if the file has one."""
    for name in ('head.fc', 'head.layers.head', 'head', 'model.head'):
        weight = state_dict.get(f'{name}.weight')
        if weight is not None and weight.ndim == 2 and weight.shape[1] == backbone.out_channels[-1]:
            return weight, state_dict.get(f'{name}.bias')
    return None


def forward(backbone: nn.Module, size: tuple[int, int], head: tuple[Tensor, Tensor | None] | None = None) -> str:
    """Run noise through a backbone, and a classifier's head behind it if it gives vectors; the outcome as text.

    Raises:
        CheckpointError: if a result is not finite, or is the same everywhere.
    """
    backbone.eval()
    first = next(backbone.parameters())
    channels = next(m.in_channels for m in backbone.modules() if isinstance(m, nn.Conv2d))
    image = torch.randn(1, channels, *size, generator=torch.Generator().manual_seed(0)).to(first.device)
    start = clock(first.device)
    with torch.no_grad():
        outputs = [out[0] if isinstance(out, list | tuple) else out for out in backbone(image)]
        if head is not None and outputs[-1].ndim == 2:
            weight, bias = (None if t is None else t.to(first) for t in head)
            outputs.append(nn.functional.linear(outputs[-1], weight, bias))
    seconds = clock(first.device) - start
    shapes = ', '.join('x'.join(map(str, out.shape)) for out in outputs)
    words = f'{size[0]}x{size[1]} pixels of noise -> {shapes} in {seconds:.1f} s'
    for output in outputs:
        if not output.isfinite().all():
            raise CheckpointError(
                f'the forward pass gives numbers that are not finite ({words}): the weights cannot be used'
            )
        if output.numel() > 1 and not output.std() > 0:
            raise CheckpointError(f'the forward pass gives one value everywhere ({words}): the weights cannot be used')
    spread = ', '.join(f'{out.mean():.3g} +- {out.std():.3g}' for out in outputs)
    classes = f'; the last are the logits of {len(head[0])} classes' if head is not None and len(outputs) > 1 else ''
    return f'{words}, finite, {spread}{classes}'


def configs_for(identity: Identity) -> dict[str, list[str]]:
    """Configs of this project that take the weights, by task."""
    folder, sizes = CONFIGS[identity.family]
    if identity.size not in sizes:
        return {}
    name = re.compile(rf'(?<![a-z0-9]){folder.replace("_", "-")}[-_]{sizes[identity.size]}(?![a-z0-9])')
    found = sorted(
        path
        for path in (config_folders()[0] / folder).glob('*.py')
        if name.search(path.name) and 'the former name' not in path.read_text()
    )
    result = {}
    for task, mark in TASKS.items():
        names = [f'configs/{folder}/{path.name}' for path in found if mark in path.name]
        if task == 'classification' and identity.family == 'Vim':
            long = 'x'.join(map(str, LONG_SEQUENCE)) in ' '.join(identity.facts)
            names = [path for path in names if bool(LONG.search(path)) == long]
        if task == 'classification' and identity.family == 'MambaVision':
            names = [path for path in names if not re.search('-(attention|mixer)-', path)]
        if names:
            result[task] = names
    return result


def print_configs(identity: Identity) -> None:
    """Print the configs that take the weights."""
    found = configs_for(identity)
    if not found:
        print(f'  configs: none has this size; write arch={identity.backbone["arch"]!r} into one of your own')
    for task, names in found.items():
        print(f'  config for {task}: {names[0]}' + (f' (also {", ".join(names[1:])})' if names[1:] else ''))
