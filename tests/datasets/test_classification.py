"""A folder of images per class: every broken kind ends in one line, and legal odd ones are read."""

import os

import numpy as np
import pytest
from mmengine.logging import MMLogger
from mmpretrain.utils import register_all_modules
from PIL import Image

from mmvim.config.completion import complete_config
from mmvim.config.reading import read_config
from mmvim.datasets.classification import ClassFolderDataset
from mmvim.engine.class_labels import check_labels
from mmvim.errors import InputError

PICTURE = np.random.default_rng(0).integers(0, 256, (24, 32, 3)).astype(np.uint8)
PIPELINE = [dict(type='LoadImageFromFile'), dict(type='PackInputs')]
CONFIGS = ('vim/vim-ti_folder.py', 'mambavision/mambavision-t_folder.py')


def draw(path, array=PICTURE):
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.fromarray(array).save(path)


@pytest.fixture
def folder(tmp_path):
    """Two images of each of two classes, for training and validation."""
    register_all_modules(init_default_scope=True)
    for split in ('train', 'val'):
        for name in ('cat', 'dog'):
            for i in range(2):
                draw(tmp_path / split / name / f'{i}.png')
    return tmp_path


@pytest.fixture
def said(monkeypatch):
    """Lines of the log, without those of mmengine about its registries."""
    lines = []
    logger = MMLogger.get_current_instance()

    def handle(record):
        if 'registry' not in record.getMessage():
            lines.append(record.getMessage())

    monkeypatch.setattr(logger, 'handle', handle)
    return lines


def read(folder, **settings):
    dataset = ClassFolderDataset(data_root=str(folder / 'train'), pipeline=PIPELINE, **settings)
    return [
        (os.path.relpath(s['img_path'], folder / 'train'), s['gt_label'])
        for s in map(dataset.get_data_info, range(len(dataset)))
    ]


def empty(folder):
    for path in folder.rglob('*.png'):
        path.unlink()


def remove(folder):
    empty(folder)
    folder.rmdir()


def rename(folder, **names):
    for old, new in names.items():
        (folder / old).rename(folder / new)


def cut(path):
    path.write_bytes(path.read_bytes()[:60])


BROKEN = {
    'no folder': (lambda f: f.rename(f.with_name('other')), 'does not exist: set data_root'),
    'empty folder': (lambda f: [remove(f / 'cat'), remove(f / 'dog')], 'holds 0 images and no class folders'),
    'flat folder': (
        lambda f: [(f / c / '0.png').rename(f / f'{c}.png') for c in ('cat', 'dog')]
        and [remove(f / c) for c in ('cat', 'dog')],
        'holds 2 images and no class folders: put the images of each class into a folder',
    ),
    'splits': (lambda f: rename(f, cat='train', dog='Val'), 'which are splits and not classes'),
    'one class': (lambda f: remove(f / 'dog'), 'has one class, cat: there is nothing to learn'),
    'no images': (empty, 'hold no image that ends in'),
    'other files only': (lambda f: [p.rename(f'{p}.txt') for p in f.rglob('*.png')], 'hold no image that ends in'),
    'empty file': (lambda f: (f / 'cat/1.png').write_bytes(b''), "cat/1.png' is empty"),
    'text': (lambda f: (f / 'cat/1.png').write_text('no picture'), "cat/1.png' cannot be read (not an image"),
    'truncated': (lambda f: cut(f / 'cat/1.png'), "cat/1.png' cannot be read"),
    'FIFO': (lambda f: os.mkfifo(f / 'dog/9.png'), "dog/9.png' is no regular file"),
    'link to nothing': (lambda f: (f / 'dog/9.png').symlink_to('gone.png'), "dog/9.png' does not exist, as the link"),
    'two bad': (lambda f: [cut(f / 'cat/1.png'), cut(f / 'dog/1.png')], '2 of 4 images cannot be used, the first'),
}  # fmt: skip


@pytest.mark.parametrize('damage, expected', BROKEN.values(), ids=BROKEN)
def test_a_broken_folder_is_one_line(folder, damage, expected):
    damage(folder / 'train')
    with pytest.raises(InputError) as raised:
        read(folder)
    assert expected in str(raised.value) and '\n' not in str(raised.value)


UNLIKE = {
    'another class': (lambda f: draw(f / 'fox/0.png'), "does not know: ['fox']; it knows ['cat', 'dog']"),
    'other case': (lambda f: rename(f, cat='Cat'), "does not know: ['Cat'] (there is 'cat', which differs in case"),
    'other names': (lambda f: rename(f, cat='0', dog='1'), "does not know: ['0', '1']"),
}  # fmt: skip


@pytest.mark.parametrize('damage, expected', UNLIKE.values(), ids=UNLIKE)
def test_a_validation_folder_with_other_classes_is_refused(folder, damage, expected):
    damage(folder / 'train')
    with pytest.raises(InputError) as raised:
        read(folder, metainfo=dict(classes=('cat', 'dog')), test_mode=True)
    assert expected in str(raised.value)


def test_indices_are_those_of_the_given_classes_though_some_are_missing(folder, said):
    classes = ('ant', 'dog', 'cat', 'emu')
    assert set(read(folder, metainfo=dict(classes=classes), test_mode=True)) == {
        ('cat/0.png', 2), ('cat/1.png', 2), ('dog/0.png', 1), ('dog/1.png', 1)
    }  # fmt: skip
    assert any('no image of ant, emu' in line and 'missing from the metrics' in line for line in said)


def test_a_label_beyond_the_head_is_named(folder):
    dataset = ClassFolderDataset(data_root=str(folder / 'train'), pipeline=PIPELINE)
    check_labels(dataset, 'train_dataloader', 2)
    with pytest.raises(InputError, match=r"train_dataloader: image '.*dog/0.png' has the label 1, but .*num_classes=1"):
        check_labels(dataset, 'train_dataloader', 1)


def test_only_some_classes(folder, said):
    draw(folder / 'train/fox/0.png')
    found = read(folder, metainfo=dict(classes=('fox', 'cat')), only_classes=True)
    assert {path.split('/')[0] for path, _ in found} == {'fox', 'cat'} and any(
        "left out: ['dog']" in line for line in said
    )
    with pytest.raises(InputError, match=r"has no folder for the classes \['emu'\]"):
        read(folder, metainfo=dict(classes=('emu', 'cat')), only_classes=True)
    with pytest.raises(InputError, match="names 'cat' twice"):
        read(folder, metainfo=dict(classes=('cat', 'cat')), only_classes=True)


def test_hidden_stray_nested_and_linked_files(folder, said):
    train = folder / 'train'
    draw(train / '.ipynb_checkpoints/0.png')
    draw(train / 'cat/.hidden.png')
    draw(train / 'cat/.thumbnails/0.png')
    draw(train / 'dog/big/old/7.png')
    draw(train / 'stray.png')
    (train / 'dog/LOUD.PNG').write_bytes((train / 'dog/0.png').read_bytes())
    (train / 'dog/notes.txt').write_text('x')
    (train / 'dog/linked.png').symlink_to('0.png')
    (train / 'cat/loop').symlink_to('..' + '/cat')
    (train / 'fox').mkdir()
    found = read(folder)
    assert sorted(path for path, label in found if label == 1) == [
        'dog/0.png', 'dog/1.png', 'dog/LOUD.PNG', 'dog/big/old/7.png', 'dog/linked.png'
    ]  # fmt: skip
    assert len(found) == 7
    for expected in ("1 '.txt'", "in no class folder: 'stray.png'", 'no image of fox'):
        assert any(expected in line for line in said), (expected, said)


@pytest.mark.parametrize('dtype, expected', [(np.uint16, 'lower 8 are dropped'), (np.float32, 'cannot read')])
def test_images_of_more_than_8_bits_are_named_or_scaled(folder, said, dtype, expected):
    deep = PICTURE[..., 0].astype(dtype) * 16
    Image.fromarray(deep).save(folder / 'train' / 'cat' / '1.tif')
    try:
        read(folder)
    except InputError as error:
        said.append(str(error))
    assert sum(expected in line and 'value_range' in line for line in said) == 1
    said.clear()
    pipeline = [dict(type='mmvim.LoadImageFromFile', value_range=(0, 16 * 255)), PIPELINE[1]]
    dataset = ClassFolderDataset(data_root=str(folder / 'train'), pipeline=pipeline)
    image = next(dataset[i] for i in range(5) if dataset.get_data_info(i)['img_path'].endswith('1.tif'))['inputs']
    assert (image.numpy() == np.rint(deep / 16)).all() and 'bits' not in ''.join(said)


@pytest.mark.parametrize(
    'folders, classes, expected',
    [
        (['1', '2'], ['cat', 'dog', 1, 2], ('cat', 'dog', '1', '2')),
        (['__MACOSX', '@eaDir', '.thumbs'], None, ('cat', 'dog')),
    ],
    ids=['numbers', 'folders of systems'],
)
def test_what_is_a_class_and_its_name(folder, folders, classes, expected):
    for name in folders:
        draw(folder / 'train' / name / '0.png')
    dataset = ClassFolderDataset(
        data_root=str(folder / 'train'), pipeline=PIPELINE, metainfo=classes and dict(classes=classes)
    )
    assert tuple(dataset.metainfo['classes']) == expected


@pytest.mark.parametrize('make', ['gray', 'alpha', 'CMYK.jpg', 'palette', 'tail.jpg', 'tiff', 'webp'])
def test_legal_odd_images(folder, said, make):
    path = folder / 'train/cat/9.png'
    image = Image.fromarray(PICTURE)
    if make == 'gray':
        image.convert('L').save(path)
    elif make == 'alpha':
        image.convert('RGBA').save(path)
    elif make == 'CMYK.jpg':
        image.convert('CMYK').save(path, 'JPEG')
    elif make == 'palette':
        image.convert('P').save(path)
    elif make == 'tail.jpg':
        image.save(path, 'JPEG')
        path.write_bytes(path.read_bytes() + b'movie')
    else:
        image.save(path.with_suffix(f'.{make}'))
    assert len(read(folder)) == 5 and not said


def test_unreadable_images_are_left_out_if_asked_for(folder, said):
    cut(folder / 'train/cat/1.png')
    assert len(read(folder, skip_bad_images=True)) == 3
    assert any('1 of 4 images are unusable and left out' in line and 'cat/1.png' in line for line in said)
    for path in (folder / 'train').rglob('*.png'):
        path.write_bytes(b'x')
    with pytest.raises(InputError, match='none of the 4 images'):
        read(folder, skip_bad_images=True)


@pytest.mark.parametrize('config', CONFIGS)
def test_names_and_numbers_follow_the_folders(folder, config):
    draw(folder / 'train/fox/0.png')
    cfg = read_config(config, dict(data_root=str(folder), image_size=64))
    complete_config(cfg)
    assert cfg.model.head.num_classes == cfg.data_preprocessor.num_classes == 3
    assert {loader.dataset.metainfo.classes for loader in (cfg.train_dataloader, cfg.val_dataloader)} == {
        ('cat', 'dog', 'fox')
    }
    assert cfg.train_dataloader.dataset.pipeline[1].scale == 64
    assert (cfg.val_dataloader.dataset.pipeline[1].scale, cfg.val_dataloader.dataset.pipeline[2].crop_size) == (73, 64)
    assert cfg.model.backbone.get('img_size', 64) == 64
    with pytest.raises(InputError, match='num_classes=5, but there are 3 classes'):
        complete_config(read_config(config, dict(data_root=str(folder), num_classes=5)))
    with pytest.raises(InputError, match="image_size='big'"):
        complete_config(read_config(config, dict(data_root=str(folder), image_size='big')))


def test_the_preprocessor_of_an_inherited_classifier_follows_the_head(tmp_path):
    text = "_base_ = 'mmvim::vim/vim-ti_8xb128_in1k.py'\nmodel = dict(head=dict(num_classes=7))\n"
    (tmp_path / 'c.py').write_text(text)
    cfg = read_config(str(tmp_path / 'c.py'))
    complete_config(cfg)
    assert cfg.data_preprocessor.num_classes == 7
    cfg = read_config(str(tmp_path / 'c.py'), {'data_preprocessor.num_classes': 5})
    with pytest.raises(InputError, match=r'data_preprocessor.num_classes=5, but model.head.num_classes=7: .* set both'):
        complete_config(cfg)
    (tmp_path / 'c.py').write_text(text.replace('7', '3'))
    with pytest.raises(InputError, match=r'val_evaluator.topk=\(1, 5\), but the model has 3 classes'):
        complete_config(read_config(str(tmp_path / 'c.py')))
