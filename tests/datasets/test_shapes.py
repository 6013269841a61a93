import json
from multiprocessing import get_context

import cv2
import numpy as np
import pytest
from pycocotools.coco import COCO

from mmvim.datasets import shapes
from mmvim.datasets.shapes import CLASSES, draw_image, ensure_shapes

SMALL = dict(num_train=6, num_val=3, image_size=(80, 96), size_range=(16, 60))


def contents(root):
    return {str(path.relative_to(root)): path.read_bytes() for path in sorted(root.rglob('*')) if path.is_file()}


def draw(seed, size_range=(20, 72)):
    return draw_image(np.random.default_rng(seed), (128, 128), 5, size_range)


@pytest.fixture(scope='module')
def root(tmp_path_factory):
    return ensure_shapes(tmp_path_factory.mktemp('data') / 'shapes', **SMALL)


def test_a_seed_gives_the_same_bytes_every_time(root, tmp_path):
    again = ensure_shapes(tmp_path / 'again', **SMALL)
    assert contents(again) == contents(root)


def test_an_image_does_not_depend_on_how_many_there_are(root, tmp_path):
    more = ensure_shapes(tmp_path / 'more', **dict(SMALL, num_train=8))
    for name in ('train/000005.png', 'label_maps/train/000005.png', 'val/000002.png'):
        assert (more / name).read_bytes() == (root / name).read_bytes()


def test_another_seed_gives_other_images_and_splits_differ(root, tmp_path):
    other = contents(ensure_shapes(tmp_path / 'other', **SMALL, seed=1))
    assert other['train/000000.png'] != contents(root)['train/000000.png']
    assert other['train/000000.png'] != other['val/000000.png']


@pytest.mark.parametrize('split', ['train', 'val'])
def test_boxes_masks_and_label_maps_say_the_same(root, split):
    coco = COCO(str(root / 'annotations' / f'{split}.json'))
    assert [coco.cats[i + 1]['name'] for i in range(len(CLASSES))] == list(CLASSES)
    assert len(coco.imgs) == SMALL[f'num_{split}']
    for number, entry in coco.imgs.items():
        image = cv2.imread(str(root / split / entry['file_name']))
        assert image.shape == (entry['height'], entry['width'], 3) == (80, 96, 3)
        label_map = cv2.imread(str(root / 'label_maps' / split / entry['file_name']), cv2.IMREAD_UNCHANGED)
        drawn = np.zeros_like(label_map)
        for annotation in coco.imgToAnns[number]:
            mask = coco.annToMask(annotation).astype(bool)
            assert not drawn[mask].any(), 'visible parts of two shapes share a pixel'
            drawn[mask] = annotation['category_id']
            rows, columns = np.nonzero(mask)
            x, y, width, height = annotation['bbox']
            assert (x, y) == (columns.min(), rows.min())
            assert (x + width - 1, y + height - 1) == (columns.max(), rows.max())
            assert annotation['area'] == mask.sum()
        assert np.array_equal(drawn, label_map)


def test_run_lengths_of_masks_that_touch_the_first_pixel():
    mask = np.zeros((3, 4), bool)
    mask[0, 0] = mask[2, 3] = True
    entry = shapes._coco(mask)
    assert entry['segmentation']['counts'] == [0, 1, 10, 1]
    assert entry['bbox'] == [0, 0, 4, 3]


def test_shapes_vary_in_class_and_size_and_cover_each_other():
    labels, areas, overlaps = set(), [], 0
    for seed in range(40):
        _, classes, masks = draw(seed)
        labels.update(classes)
        areas += [mask.sum() for mask in masks]
        boxes = [(np.nonzero(m.any(0))[0][[0, -1]], np.nonzero(m.any(1))[0][[0, -1]]) for m in masks]
        overlaps += any(
            a[0][0] <= b[0][1] and b[0][0] <= a[0][1] and a[1][0] <= b[1][1] and b[1][0] <= a[1][1]
            for i, a in enumerate(boxes)
            for b in boxes[:i]
        )
    assert labels == set(range(len(CLASSES)))
    assert max(areas) > 8 * min(areas)
    assert 8 <= overlaps < 40


def test_colour_says_nothing_about_the_class():
    colours = {label: [] for label in range(len(CLASSES))}
    for seed in range(100):
        image, labels, masks = draw(seed)
        for label, mask in zip(labels, masks, strict=True):
            colours[label].append(image[mask].mean(0))
    overall = np.concatenate(list(colours.values()))
    for values in colours.values():
        standard_error = overall.std(0) / np.sqrt(len(values))
        assert (np.abs(np.mean(values, axis=0) - overall.mean(0)) < 4 * standard_error).all()
        assert (np.std(values, axis=0) > 30).all()


def test_each_class_has_its_own_form():
    filled = {name: [] for name in CLASSES}
    for seed in range(10):
        for label, name in enumerate(CLASSES):
            rng = np.random.default_rng([label, seed])
            mask = shapes._inside(shapes._outline(rng, label, 128, 128, (60, 60)), 128, 128)
            rows, columns = np.nonzero(mask)
            hull = cv2.minAreaRect(np.stack((columns, rows), 1).astype(np.float32))[1]
            filled[name].append(len(rows) / ((hull[0] + 1) * (hull[1] + 1)))
    mean = {name: np.mean(values) for name, values in filled.items()}
    assert mean['rectangle'] > 0.9 > mean['circle'] > 0.7 > mean['triangle'] > mean['star'] > 0.2


def test_an_interrupted_generation_leaves_nothing(tmp_path, monkeypatch):
    whole = shapes._write_split

    def fail_later(root, split, recipe):
        whole(root, split, recipe)
        if split == 'train':
            raise KeyboardInterrupt

    monkeypatch.setattr(shapes, '_write_split', fail_later)
    with pytest.raises(KeyboardInterrupt):
        ensure_shapes(tmp_path / 'shapes', **SMALL)
    assert not list(tmp_path.iterdir())
    monkeypatch.undo()
    assert ensure_shapes(tmp_path / 'shapes', **SMALL).is_dir()


def test_processes_that_ask_at_once_get_one_data_set(root, tmp_path):
    context = get_context('spawn')
    target = tmp_path / 'data' / 'shapes'
    processes = [context.Process(target=ensure_shapes, args=(target,), kwargs=SMALL) for _ in range(2)]
    for process in processes:
        process.start()
    for process in processes:
        process.join()
    assert [process.exitcode for process in processes] == [0, 0]
    assert [path.name for path in target.parent.iterdir()] == ['shapes']
    assert contents(target) == contents(root)


def test_what_is_there_already_is_never_changed(root, tmp_path):
    before = contents(root)
    with pytest.raises(FileExistsError, match=r"other settings.*'seed': 0.*another data_root"):
        ensure_shapes(root, **SMALL, seed=3)
    assert contents(root) == before
    (tmp_path / 'thesis.txt').write_text('mine')
    with pytest.raises(FileExistsError, match='holds other files.*data_root of their own'):
        ensure_shapes(tmp_path, **SMALL)
    assert (tmp_path / 'thesis.txt').read_text() == 'mine'


def test_an_empty_folder_is_filled(tmp_path):
    (tmp_path / 'shapes').mkdir()
    root = ensure_shapes(tmp_path / 'shapes', **SMALL)
    assert len(json.loads((root / 'annotations' / 'train.json').read_text())['images']) == SMALL['num_train']


@pytest.mark.parametrize(
    'settings', [dict(num_val=0), dict(size_range=(4, 20)), dict(size_range=(40, 20)), dict(size_range=(20, 200))]
)
def test_settings_out_of_range_are_refused(settings, tmp_path):
    with pytest.raises(ValueError, match='must'):
        ensure_shapes(tmp_path / 'shapes', **settings)
    assert not list(tmp_path.iterdir())
