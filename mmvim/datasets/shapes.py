"""The demo data set of drawn shapes: images, COCO boxes and masks, and label maps, generated on first use.

Every image is a cluttered background with a few filled shapes of varied size that may cover each other. Colours are
drawn independently of the class, so that only the outline tells the classes apart.
"""

import argparse
import inspect
import json
import os
import shutil
import tempfile
from collections.abc import Sequence
from pathlib import Path

import cv2
import numpy as np

# H, W height and width of an image, P points of an outline

CLASSES = ('circle', 'rectangle', 'triangle', 'star')
PALETTE = ((230, 60, 60), (60, 120, 230), (60, 180, 90), (240, 170, 40))
SPLITS = ('train', 'val')
RECIPE = 'recipe.json'
_VERSION = 1
_MIN_VISIBLE = 0.5
_MIN_CONTRAST = 80.0  # distance of two colours, of 8 bits each


def shapes_recipe(
    num_train: int = 400,
    num_val: int = 80,
    image_size: tuple[int, int] = (128, 128),
    max_shapes: int = 4,
    size_range: tuple[int, int] = (28, 84),
    seed: int = 0,
) -> dict:
    """Everything that decides the bytes of a generated data set, checked.

    Args:
        num_train: images of the training split.
        num_val: images of the validation split.
        image_size: height and width of every image, pixels.
        max_shapes: shapes an image holds at most; it holds at least one.
        size_range: smallest and largest diameter of a shape's circumscribed circle, pixels.
        seed: seed of all random choices.

    Raises:
        ValueError: if a number is out of range; the message gives the legal ones.
    """
    recipe = dict(
        version=_VERSION,
        num_train=int(num_train),
        num_val=int(num_val),
        image_size=[int(side) for side in image_size],
        max_shapes=int(max_shapes),
        size_range=[int(side) for side in size_range],
        seed=int(seed),
    )
    if min(num_train, num_val, max_shapes) < 1 or seed < 0:
        raise ValueError(f'num_train, num_val and max_shapes must be at least 1 and seed at least 0, got {recipe}')
    low, high = size_range
    if not 8 <= low <= high <= min(image_size):
        raise ValueError(
            f'size_range must rise within 8 and the shorter side of image_size, got {size_range} for {image_size}'
        )
    return recipe


def ensure_shapes(data_root: str | os.PathLike, **settings) -> Path:
    """Generate the data set in a folder unless it is already there, and return the folder.

    The folder appears complete or not at all, even if the generation is interrupted or several processes ask for it at
    once. It then holds ``train/`` and ``val/`` (images), ``annotations/train.json`` and ``val.json`` (COCO
    format; masks are the visible parts as uncompressed run lengths), and ``label_maps/train/`` and ``val/`` (one
    byte per pixel, 0 background, i + 1 class i).

    Args:
        data_root: the folder.
        settings: arguments of :func:`shapes_recipe`.

    Raises:
        ValueError: if a setting is out of range.
        FileExistsError: if the folder holds something else, or shapes of other settings.
    """
    data_root = Path(data_root)
    recipe = shapes_recipe(**settings)
    if _is_there(data_root, recipe):
        return data_root
    data_root.parent.mkdir(parents=True, exist_ok=True)
    partial = Path(tempfile.mkdtemp(prefix=f'.{data_root.name}.partial-', dir=data_root.parent))
    try:
        for split in SPLITS:
            _write_split(partial, split, recipe)
        (partial / RECIPE).write_text(json.dumps(recipe, indent=1) + '\n')
        partial.chmod(0o755)
        try:
            partial.rename(data_root)
        except OSError:  # another process was faster
            if not _is_there(data_root, recipe):
                raise
    finally:
        shutil.rmtree(partial, ignore_errors=True)
    return data_root


def _is_there(data_root: Path, recipe: dict) -> bool:
    if not data_root.exists() or (data_root.is_dir() and not any(data_root.iterdir())):
        return False
    try:
        found = json.loads((data_root / RECIPE).read_text())
    except (OSError, ValueError):
        raise FileExistsError(
            f"'{data_root}' holds other files (no readable {RECIPE} in it): "
            'give the generated shapes a data_root of their own'
        ) from None
    if found != recipe:
        differing = {key: found.get(key) for key in recipe if found.get(key) != recipe[key]}
        raise FileExistsError(
            f"'{data_root}' holds shapes generated with other settings ({differing}): "
            'choose another data_root, or delete the folder to have it generated anew'
        )
    return True


def _write_split(root: Path, split: str, recipe: dict) -> None:
    images, annotations = [], []
    for folder in (root / split, root / 'label_maps' / split, root / 'annotations'):
        folder.mkdir(parents=True, exist_ok=True)
    height, width = recipe['image_size']
    for index in range(recipe[f'num_{split}']):
        rng = np.random.default_rng([recipe['seed'], SPLITS.index(split), index])
        image, labels, masks = draw_image(rng, recipe['image_size'], recipe['max_shapes'], recipe['size_range'])
        name = f'{index:06d}.png'
        _write_png(root / split / name, image[..., ::-1])
        label_map = np.zeros((height, width), np.uint8)
        for label, mask in zip(labels, masks, strict=True):
            label_map[mask] = label + 1
            annotations.append(dict(id=len(annotations) + 1, image_id=index + 1, category_id=label + 1, **_coco(mask)))
        _write_png(root / 'label_maps' / split / name, label_map)
        images.append(dict(id=index + 1, file_name=name, height=height, width=width))
    categories = [dict(id=i + 1, name=name) for i, name in enumerate(CLASSES)]
    content = dict(info=dict(description='drawn shapes', recipe=recipe), images=images, annotations=annotations)
    text = json.dumps(dict(content, categories=categories), separators=(',', ':'))
    (root / 'annotations' / f'{split}.json').write_text(text + '\n')


def _write_png(path: Path, image: np.ndarray) -> None:
    done, data = cv2.imencode('.png', np.ascontiguousarray(image))
    if not done:
        raise OSError(f"could not encode '{path}'")
    path.write_bytes(data.tobytes())


def _coco(mask: np.ndarray) -> dict:
    """Box (x, y, width, height), area and run lengths down the columns of a mask (H, W), as COCO has them."""
    rows, columns = np.flatnonzero(mask.any(1)), np.flatnonzero(mask.any(0))
    box = [columns[0], rows[0], columns[-1] - columns[0] + 1, rows[-1] - rows[0] + 1]
    flat = mask.ravel(order='F')
    edges = np.flatnonzero(np.diff(flat)) + 1
    counts = np.diff(np.concatenate(([0], edges, [flat.size]))).tolist()
    if flat[0]:
        counts.insert(0, 0)
    return dict(
        bbox=[int(side) for side in box],
        area=int(mask.sum()),
        iscrowd=0,
        segmentation=dict(size=list(mask.shape), counts=counts),
    )


def draw_image(
    rng: np.random.Generator, image_size: Sequence[int], max_shapes: int, size_range: Sequence[int]
) -> tuple[np.ndarray, list[int], list[np.ndarray]]:
    """Draw one image.

    Args:
        rng: source of all random choices.
        image_size: height H and width W, pixels.
        max_shapes: the image gets 1 to this many shapes, fewer where no place is left.
        size_range: smallest and largest diameter, pixels.

    Returns:
        The image (H, W, 3), uint8, red first; the class of each shape; its visible pixels (H, W), bool.
    """
    height, width = image_size
    image = _background(rng, height, width)
    labels: list[int] = []
    whole: list[np.ndarray] = []
    masks: list[np.ndarray] = []
    for _ in range(int(rng.integers(1, max_shapes + 1))):
        for _ in range(20):
            label = int(rng.integers(len(CLASSES)))
            mask = _inside(_outline(rng, label, height, width, size_range), height, width)
            covered = [old & ~mask for old in masks]
            if mask.sum() >= 40 and all(
                left.sum() >= _MIN_VISIBLE * full.sum() for left, full in zip(covered, whole, strict=True)
            ):
                image[mask] = _fill(rng, height, width, image[mask].mean(0))[mask]
                labels.append(label)
                whole.append(mask)
                masks = [*covered, mask]
                break
    return image, labels, masks


def _colour(rng: np.random.Generator) -> np.ndarray:
    return rng.uniform(20, 235, 3)


def _background(rng: np.random.Generator, height: int, width: int) -> np.ndarray:
    """Coloured noise of two scales, strokes and small patches: nothing in it is filled, closed and large."""
    image: np.ndarray = np.zeros((height, width, 3))
    for cells, strength in ((3, 1.0), (12, 0.35)):
        grid = np.stack([_colour(rng) for _ in range(cells * cells)]).reshape(cells, cells, 3)
        image = image * (1 - strength) + _enlarge(grid, height, width) * strength
    yy, xx = _pixel_centres(height, width)
    for _ in range(int(rng.integers(6, 14))):
        start, angle = rng.uniform(0, 1, 2) * (height, width), rng.uniform(0, np.pi)
        along = (xx - start[1]) * np.cos(angle) + (yy - start[0]) * np.sin(angle)
        bend = rng.uniform(-0.01, 0.01) * along**2
        across = np.abs((yy - start[0]) * np.cos(angle) - (xx - start[1]) * np.sin(angle) - bend)
        stroke = (across < rng.uniform(0.6, 2.2)) & (np.abs(along) < rng.uniform(0.08, 0.4) * max(height, width))
        image[stroke] = _colour(rng)
    for _ in range(int(rng.integers(10, 30))):
        centre, radius = rng.uniform(0, 1, 2) * (height, width), rng.uniform(1, 3.5)
        image[(yy - centre[0]) ** 2 + (xx - centre[1]) ** 2 < radius**2] = _colour(rng)
    return _grain(rng, image)


def _fill(rng: np.random.Generator, height: int, width: int, behind: np.ndarray) -> np.ndarray:
    """A colour unlike that behind it, which changes slowly along a random direction, with grain."""
    yy, xx = _pixel_centres(height, width)
    angle = rng.uniform(0, 2 * np.pi)
    ramp = (xx / width * np.cos(angle) + yy / height * np.sin(angle))[..., None]
    colour = _colour(rng)
    while np.linalg.norm(colour - behind) < _MIN_CONTRAST:
        colour = _colour(rng)
    return _grain(rng, colour + ramp * rng.uniform(-40, 40, 3))


def _grain(rng: np.random.Generator, image: np.ndarray) -> np.ndarray:
    return np.clip(np.rint(image + rng.normal(0, 8, image.shape)), 0, 255).astype(np.uint8)


def _enlarge(grid: np.ndarray, height: int, width: int) -> np.ndarray:
    """Linear interpolation of a small grid (h, w, 3) to (H, W, 3)."""
    rows, columns = np.linspace(0, grid.shape[0] - 1, height), np.linspace(0, grid.shape[1] - 1, width)
    top, left = np.minimum(rows.astype(int), grid.shape[0] - 2), np.minimum(columns.astype(int), grid.shape[1] - 2)
    down, right = (rows - top)[:, None, None], (columns - left)[None, :, None]
    upper = grid[top][:, left] * (1 - right) + grid[top][:, left + 1] * right
    lower = grid[top + 1][:, left] * (1 - right) + grid[top + 1][:, left + 1] * right
    return upper * (1 - down) + lower * down


def _pixel_centres(height: int, width: int) -> tuple[np.ndarray, np.ndarray]:
    return np.arange(height)[:, None] + 0.5, np.arange(width)[None, :] + 0.5


def _outline(
    rng: np.random.Generator, label: int, height: int, width: int, size_range: Sequence[int]
) -> tuple[np.ndarray, np.ndarray]:
    """Points (P, 2) of an outline, x first, and its centre."""
    radius = float(np.exp(rng.uniform(*np.log(np.asarray(size_range) / 2))))
    turn = rng.uniform(0, 2 * np.pi)
    name = CLASSES[label]
    angles: np.ndarray
    radii: np.ndarray
    if name == 'circle':
        angles, radii = np.linspace(0, 2 * np.pi, 64, endpoint=False), np.ones(64)
    elif name == 'rectangle':
        half = rng.uniform(0.45, np.pi / 4)
        angles, radii = np.array([half, np.pi - half, np.pi + half, -half]), np.ones(4)
    elif name == 'triangle':
        angles, radii = np.arange(3) * 2 * np.pi / 3 + rng.uniform(-0.25, 0.25, 3), np.ones(3)
    else:
        angles, radii = np.arange(10) * np.pi / 5, np.where(np.arange(10) % 2, rng.uniform(0.38, 0.5), 1.0)
    unit = np.stack((np.cos(angles + turn), np.sin(angles + turn)), axis=1)
    margin = radius * 0.8
    low, high = np.minimum(margin, [width / 2, height / 2]), np.maximum([width, height] - np.asarray(margin), 0)
    centre = rng.uniform(low, np.maximum(low, high))
    return unit * radii[:, None] * radius + centre, centre


def _inside(outline: tuple[np.ndarray, np.ndarray], height: int, width: int) -> np.ndarray:
    """Pixels (H, W) whose centre lies inside an outline that is star-shaped about its centre, or not, by crossings."""
    points, _ = outline
    yy, xx = _pixel_centres(height, width)
    inside = np.zeros((height, width), bool)
    for (x0, y0), (x1, y1) in zip(points, np.roll(points, -1, axis=0), strict=True):
        if y0 != y1:
            crosses = (y0 > yy) != (y1 > yy)
            inside ^= crosses & (xx < x0 + (yy - y0) * (x1 - x0) / (y1 - y0))
    return inside


def main() -> None:
    """Command line: ``python -m mmvim.datasets.shapes data/shapes --seed 1``."""
    parser = argparse.ArgumentParser(description='Generate the demo data set of drawn shapes.')
    parser.add_argument('data_root', nargs='?', default='data/shapes')
    pairs = dict(image_size=('HEIGHT', 'WIDTH'), size_range=('LOW', 'HIGH'))
    for name, parameter in inspect.signature(shapes_recipe).parameters.items():
        form = dict(nargs=2, metavar=pairs[name]) if name in pairs else {}
        parser.add_argument(f'--{name.replace("_", "-")}', type=int, default=parameter.default, **form)
    settings = vars(parser.parse_args())
    try:
        print(f'shapes are in {ensure_shapes(settings.pop("data_root"), **settings)}')
    except (ValueError, FileExistsError) as error:
        parser.exit(1, f'error: {error}\n')


if __name__ == '__main__':
    main()
