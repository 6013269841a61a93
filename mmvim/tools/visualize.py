"""What `tools/visualize_features.py` does."""

import argparse
import os
from pathlib import Path

import cv2
import mmcv
import numpy as np
import torch
from mmengine.config import Config
from mmengine.registry import MODELS
from torch import Tensor, nn

from mmvim.config.completion import complete_config
from mmvim.config.reading import read_config
from mmvim.errors import ConfigError, DataError
from mmvim.tools.command_line import add_cfg_options, find_checkpoint, new_parser
from mmvim.tools.pictures import CHANNELS, draw_features, draw_receptive_field, draw_scan
from mmvim.tools.tracing import Block, receptive_field, trace
from mmvim.tools.weights import backbone_weights, image_size, model_of
from mmvim.weights.reading import load_from_local

PICTURES = ('features', 'receptive-field', 'scan')


def parser() -> argparse.ArgumentParser:
    """Arguments of tools/visualize_features.py."""
    result = new_parser(
        'Draw what a backbone does with an image: feature maps, the effective receptive field of one '
        'position, and the order of the scan with the decay of its state in both directions.',
    )
    result.add_argument('image', help='image file')
    result.add_argument('config', help='config file, also one of mmvim')
    result.add_argument(
        'checkpoint', help="checkpoint of the config's model or a published one, or a work directory; none for random"
    )
    result.add_argument(
        '--block', type=int, nargs='+', help='blocks, counted from 0 through all stages; the last by default'
    )
    result.add_argument('--channels', default='norm', help=f'{", ".join(CHANNELS)}, or the number of a channel')
    result.add_argument(
        '--position',
        type=float,
        nargs=2,
        default=(0.5, 0.5),
        metavar=('Y', 'X'),
        help='position for receptive field and decay, from 0 0 (top left) to 1 1; the middle by default',
    )
    result.add_argument('--only', nargs='+', choices=PICTURES, default=PICTURES, help='which pictures; all by default')
    result.add_argument(
        '--size',
        type=int,
        help="shorter side of the image, pixels; by default the backbone's img_size or the image's",
    )
    result.add_argument('--out-dir', default='pictures', help='folder of the pictures')
    add_cfg_options(result, 'settings that replace those of the config')
    result.add_argument('--device', choices=['cpu', 'cuda'], help='where to run; a GPU if there is one by default')
    return result


def main(args: argparse.Namespace) -> None:
    """Carry out tools/visualize_features.py.

    Raises:
        ConfigError: if an argument does not fit the model.
        DataError: if the image cannot be read.
        CheckpointError: if the checkpoint cannot be read or does not fit.
    """
    cfg = read_config(args.config, args.cfg_options)
    complete_config(cfg)
    if not all(0 <= value <= 1 for value in args.position):
        raise ConfigError(f'--position {" ".join(map(str, args.position))}: both numbers must be within 0 and 1')
    if args.size is not None and args.size < 1:
        raise ConfigError(f'--size {args.size}: must be at least 1 pixel')
    device = torch.device(args.device or ('cuda' if torch.cuda.is_available() else 'cpu'))
    picture = read_image(args.image)
    backbone = build_backbone(cfg, args.checkpoint).to(device)
    shorter = args.size or min(image_size(backbone) or (0,))
    if shorter:
        factor = shorter / min(picture.shape[:2])
        picture = mmcv.imrescale(picture, factor, interpolation='area' if factor < 1 else 'bilinear')
    image = normalize(picture, cfg).to(device).requires_grad_()
    blocks = trace(backbone, image)
    folder = Path(args.out_dir)
    folder.mkdir(parents=True, exist_ok=True)
    for index in choose_blocks(args.block, len(blocks)):
        for path in _draw(args, folder, picture, image, blocks, index):
            print(path)


def _draw(
    args: argparse.Namespace, folder: Path, picture: np.ndarray, image: Tensor, blocks: list[Block], index: int
) -> list[Path]:
    block = blocks[index]
    h, w = block.token_index.shape
    position = min(int(args.position[0] * h), h - 1), min(int(args.position[1] * w), w - 1)
    stem = f'{Path(args.image).stem}_block{index:02d}'
    written = []
    if 'features' in args.only:
        written.append(folder / f'{stem}_features.png')
        try:
            draw_features(written[-1], picture, block, args.channels)
        except ValueError as error:
            raise ConfigError(f'--channels: {error}') from None
    if 'receptive-field' in args.only:
        written.append(folder / f'{stem}_receptive-field.png')
        field = receptive_field(block, image, *position).cpu()
        draw_receptive_field(written[-1], picture, block, field, position)
    if 'scan' in args.only and block.mixer is not None:
        written.append(folder / f'{stem}_scan.png')
        draw_scan(written[-1], picture, block, position)
    elif 'scan' in args.only:
        scans = ', '.join(str(i) for i, other in enumerate(blocks) if other.mixer is not None) or 'none'
        message = f'{index} ({block.name}) has no scan; blocks with one: {scans}'
        if list(args.only) == ['scan']:
            raise ConfigError(f'--block {message}')
        print(f'block {message}')
    return written


def choose_blocks(wanted: list[int] | None, count: int) -> list[int]:
    """Blocks by number from 0; negative ones count from the end, None is the last.

    Raises:
        ConfigError: if there is no such block.
    """
    if not count:
        raise ConfigError('the backbone of this config has no blocks: there is nothing to draw')
    for index in wanted or []:
        if not -count <= index < count:
            raise ConfigError(f'--block {index}: the backbone has {count} blocks, 0 to {count - 1}')
    return sorted({index % count for index in wanted or [-1]})


def build_backbone(cfg: Config, checkpoint: str) -> nn.Module:
    """The backbone of a config with the weights of a checkpoint, in evaluation mode.

    Args:
        cfg: the config.
        checkpoint: file, or work directory; 'none' for the weights of the config's initialisation.

    Raises:
        ConfigError: if the config has no backbone, or there is no checkpoint.
        CheckpointError: if the file cannot be read or does not fit.
    """
    settings = model_of(cfg).backbone
    if checkpoint != 'none':
        checkpoint = find_checkpoint(checkpoint)
        settings.pop('init_cfg', None)
    backbone = MODELS.build(settings)
    if checkpoint == 'none':
        backbone.init_weights()
    else:
        weights, _ = backbone_weights(load_from_local(checkpoint)['state_dict'])
        backbone.load_state_dict(weights, strict=False)
    backbone.eval()  # returns nothing in some backbones of the hosts
    return backbone


def read_image(path: str) -> np.ndarray:
    """An image file as (H, W, 3), RGB, 8 bits.

    Raises:
        DataError: if it is missing or no image.
    """
    if not os.path.isfile(path):
        raise DataError(f"image '{path}' does not exist: check the path")
    image = cv2.imdecode(np.fromfile(path, np.uint8), cv2.IMREAD_COLOR) if os.path.getsize(path) else None
    if image is None:
        raise DataError(f"image '{path}' cannot be read: it is damaged or no image")
    return np.ascontiguousarray(image[..., ::-1])


def normalize(picture: np.ndarray, cfg: Config) -> Tensor:
    """Picture (H, W, 3), RGB -> the input of the config's model (1, 3, H, W), float32."""
    settings = cfg.model.get('data_preprocessor') or cfg.get('data_preprocessor') or {}
    rgb = settings.get('bgr_to_rgb') or settings.get('to_rgb')
    pixels = picture if rgb else picture[..., ::-1]
    mean, std = (np.float32(settings.get(key) or default) for key, default in (('mean', 0), ('std', 1)))
    pixels = (pixels.astype(np.float32) - mean) / std
    return torch.from_numpy(np.ascontiguousarray(pixels.transpose(2, 0, 1))[None])
