"""Images and label maps of every broken kind end in one line before the run; legal odd ones are read as they are."""

import logging
import os
import socket

import cv2
import numpy as np
import pytest
from mmengine.dataset import ConcatDataset, RepeatDataset
from mmengine.logging import MMLogger
from mmseg.datasets import BaseSegDataset
from mmseg.utils import register_all_modules
from PIL import Image

from mmvim.datasets.pipelines import name_samples
from mmvim.engine.label_scan import Legal, scan
from mmvim.errors import InputError

LABELS = np.zeros((24, 32), np.uint8)
LABELS[4:12, 6:20] = 1
PICTURE = np.random.default_rng(0).integers(0, 256, (24, 32, 3)).astype(np.uint8)
PIPELINE = [dict(type='LoadImageFromFile'), dict(type='LoadAnnotations'), dict(type='PackSegInputs')]


@pytest.fixture
def folder(tmp_path):
    """Three images and their label maps of the classes 0 and 1."""
    register_all_modules(init_default_scope=True)
    for kind, array in (('images', PICTURE), ('labels', LABELS)):
        (tmp_path / kind).mkdir()
        for i in range(3):
            Image.fromarray(array).save(tmp_path / kind / f'{i}.png')
    return tmp_path


def dataset_of(folder, pipeline=PIPELINE, **settings):
    names = settings.pop('classes', ('ground', 'thing'))
    settings.setdefault('img_suffix', '.png')
    dataset = BaseSegDataset(
        data_root=str(folder),
        data_prefix=dict(img_path='images', seg_map_path='labels'),
        metainfo=dict(classes=names),
        pipeline=pipeline,
        **settings,
    )
    name_samples(dataset)
    return dataset


def look(dataset, caplog, loader='train_dataloader', classes=2):
    """Scan and read a data set as a run does; returns what was logged."""
    logger = logging.getLogger('look')
    logger.setLevel(logging.INFO)
    with caplog.at_level(logging.INFO, 'look'):
        scan(dataset, loader, [Legal('model.decode_head', classes, 255)], logger)
    for i in range(len(dataset)):
        assert dataset[i]['data_samples'].gt_sem_seg.data.dtype.itemsize == 8
    return caplog.text


def save(array, **how):
    return lambda path: Image.fromarray(array, **how).save(path)


def cut(path, keep=0.5):
    data = path.read_bytes()
    path.write_bytes(data[: int(len(data) * keep)])


def replace(make):
    def change(path):
        path.unlink()
        make(path)

    return change


def listen(path):
    here = os.getcwd()
    os.chdir(path.parent)  # the path of a socket may have 108 characters
    socket.socket(socket.AF_UNIX).bind(path.name)
    os.chdir(here)


def jpeg(array, **how):
    return lambda path: Image.fromarray(array).save(path, 'JPEG', **how)


def with_orientation(value):
    exif = Image.Exif()
    exif[0x0112] = value
    return jpeg(PICTURE, exif=exif)


def marked(value, dtype=np.uint16):
    labels = LABELS.astype(dtype)
    labels[0, 0] = value
    return labels


def write_tiff(array):
    return lambda path: path.write_bytes(cv2.imencode('.tiff', array)[1].tobytes())


def write(data):
    return lambda path: path.write_bytes(data)


BROKEN_LABELS = {
    'missing': (os.unlink, 'does not exist: add it'),
    'empty': (write(b''), 'is empty'),
    'text': (write(b'no picture'), 'not an image of a known format'),
    'truncated': (cut, 'cannot be read'),
    'only a header': (lambda path: path.write_bytes(path.read_bytes()[:8]), 'cannot be read'),
    'link to nothing': (replace(lambda path: path.symlink_to('gone.png')), "the link points to 'gone.png'"),
    'folder': (replace(os.mkdir), 'is a folder'),
    'FIFO': (replace(os.mkfifo), 'is no regular file'),
    'socket': (replace(listen), 'is no regular file'),
    'suffix in capitals': (lambda path: path.rename(path.with_suffix('.PNG')), "('1.PNG' does)"),
    'other suffix': (lambda path: path.rename(path.with_suffix('.tif')), "('1.tif' does)"),
    'smaller': (save(LABELS[::2, ::2]), '24 rows and 32 columns, its label map'),
    'one row less': (save(LABELS[1:]), "labels/1.png' 23 and 32"),
    'turned': (save(LABELS.T.copy()), 'EXIF rotation'),
    '8 bits, value 7': (save(marked(7, np.uint8)), 'has the value 7, but model.decode_head has num_classes=2'),
    '16 bits, value 300': (save(marked(300)), 'has the value 300, but'),
    '16 bits, 0 and 256': (save((LABELS * np.uint16(256)).astype(np.uint16)), 'has the value 256, but'),
    '16 bits, 65535': (save(marked(65535)), 'has the value 65535, but'),
    '32 bits, 70000': (write_tiff(marked(70000, np.int32)), 'has the value 70000 (int32)'),
    '32 bits, -1': (write_tiff(marked(-1, np.int32)), 'has the value -1 (int32)'),
    'float, 0.5': (write_tiff(marked(0.5, np.float32)), 'has the value 0.5 (float32)'),
    'float, NaN': (write_tiff(marked(np.nan, np.float32)), 'has the value nan'),
    'colours': (save(PICTURE), 'has 3 channels, a label map has one, with the index of the class of each pixel: col'),
    'grey as colours': (save(np.repeat(LABELS[..., None], 3, 2)), 'getchannel(0)'),
    'colours and alpha': (save(np.dstack([PICTURE, PICTURE[..., :1]])), 'has 4 channels'),
    'grey and alpha': (save(np.dstack([LABELS, LABELS])), 'has 2 channels'),
    'JPEG': (jpeg(LABELS * 2, quality=20), 'has the value '),
}
BROKEN_IMAGES = {
    'empty': (write(b''), 'is empty'),
    'text': (write(b'no picture'), 'not an image of a known format'),
    'truncated': (cut, 'cannot be read'),
    'without its end': (lambda path: cut(path, 0.98), 'cannot be read'),
    'JPEG that ends early': (lambda path: (jpeg(PICTURE)(path), cut(path)), 'cannot be read'),
    'FIFO': (replace(os.mkfifo), 'is no regular file'),
    'socket': (replace(listen), 'is no regular file'),
    'link to nothing': (replace(lambda path: path.symlink_to('gone.png')), "the link points to 'gone.png'"),
    'suffix in capitals': (lambda path: path.rename(path.with_suffix('.PNG')), 'differs from img_suffix'),
    'larger': (save(np.repeat(PICTURE, 2, 0)), 'has 48 rows and 32 columns, its label map'),
    'EXIF 6': (with_orientation(6), 'EXIF rotation'),
    'EXIF 8': (with_orientation(8), 'EXIF rotation'),
}
BROKEN = [('labels', name, *row) for name, row in BROKEN_LABELS.items()]
BROKEN += [('images', name, *row) for name, row in BROKEN_IMAGES.items()]


@pytest.mark.parametrize('kind, name, damage, expected', BROKEN, ids=lambda value: value if type(value) is str else '')
def test_a_broken_file_is_one_line_that_names_it(folder, caplog, kind, name, damage, expected):
    path = folder / kind / '1.png'
    damage(path)
    with pytest.raises(InputError) as raised:
        look(dataset_of(folder), caplog)
    line = str(raised.value)
    assert expected in line and '\n' not in line
    assert f'{kind}/1.png' in line or 'suffix in capitals' in name or f"'{path.name}'" in line


LEGAL_LABELS = {
    '16 bits': save(LABELS.astype(np.uint16)),
    '32 bits': write_tiff(LABELS.astype(np.int32)),
    'whole floats': write_tiff(LABELS.astype(np.float32)),
    '1 bit': save(LABELS.astype(bool)),
    'palette': lambda path: (image := Image.fromarray(LABELS, 'P'), image.putpalette([9] * 768), image.save(path)),
    'palette of 4 bits': lambda path: Image.fromarray(LABELS).convert('P', palette=1, colors=4).save(path, bits=4),
    'compressed TIFF': lambda path: Image.fromarray(LABELS).save(path, 'TIFF', compression='tiff_lzw'),
    'BMP': lambda path: Image.fromarray(LABELS).save(path, 'BMP'),
    'GIF': lambda path: Image.fromarray(LABELS).save(path, 'GIF'),
    'interlaced or padded': lambda path: path.write_bytes(path.read_bytes() + b'\0' * 9),
    'linked': replace(lambda path: path.symlink_to('0.png')),
}
LEGAL_IMAGES = {
    'grey': save(LABELS),
    'alpha': save(np.dstack([PICTURE, PICTURE[..., :1]])),
    'JPEG in a PNG name': jpeg(PICTURE),
    'JPEG with bytes behind': lambda path: (jpeg(PICTURE)(path), path.write_bytes(path.read_bytes() + b'movie')),
    'turned EXIF of a turned picture': lambda path: Image.fromarray(PICTURE.transpose(1, 0, 2).copy()).save(
        path, 'JPEG', exif=b'Exif\0\0II*\0\x08\0\0\0\x01\0\x12\x01\x03\0\x01\0\0\0\x06\0\0\0\0\0\0\0'
    ),
    'progressive JPEG': jpeg(PICTURE, progressive=True),
    'CMYK': lambda path: Image.fromarray(PICTURE).convert('CMYK').save(path, 'JPEG'),
}
LEGAL = [('labels', name, make) for name, make in LEGAL_LABELS.items()]
LEGAL += [('images', name, make) for name, make in LEGAL_IMAGES.items()]


@pytest.mark.parametrize('kind, name, make', LEGAL, ids=lambda value: value if type(value) is str else '')
def test_a_legal_odd_file_is_accepted_and_read_as_it_is(folder, caplog, kind, name, make):
    make(folder / kind / '1.png')
    dataset = dataset_of(folder)
    assert 'WARNING' not in look(dataset, caplog)
    if kind == 'labels':
        labels = dataset[1]['data_samples'].gt_sem_seg.data[0].numpy()
        assert len(np.unique(labels[LABELS == 1])) == 1 and (labels[LABELS == 1] != labels[0, 0]).all()


def test_classes_above_255_are_read_as_they_are(folder, caplog):
    save(marked(300))(folder / 'labels/1.png')
    dataset = dataset_of(folder, classes=tuple(map(str, range(301))))
    assert '298 of 301 classes cannot be learnt' in look(dataset, caplog, classes=301)
    assert dataset[1]['data_samples'].gt_sem_seg.data.max() == 300
    with pytest.raises(InputError, match='has the value 300, and reduce_zero_label, .* is for label maps up to 255'):
        look(dataset_of(folder, reduce_zero_label=True), caplog)


@pytest.mark.parametrize(
    'value, expected, settings',
    [
        (255, '1 of 2 classes cannot be learnt, and the model will answer the only other one everywhere', {}),
        (0, 'no pixel of them: thing; values in the files: 0 (100.0%); labels are 0 to 1, 255 is ignored', {}),
        (2, 'has the value 2 (1 after reduce_zero_label), but', dict(reduce_zero_label=True, classes=('a',))),
        (1, 'every pixel of the 3 label maps of train_dataloader is ignored', dict(reduce_zero_label=True, all=0)),
        (1, 'nothing can be learnt: every pixel', dict(all=255)),
    ],
)
def test_what_cannot_be_learnt_is_said_with_the_values_found(folder, caplog, value, expected, settings):
    everywhere = settings.pop('all', None) if (settings := dict(settings)) else None
    labels = LABELS * np.uint8(value) if everywhere is None else np.full_like(LABELS, everywhere)
    for path in (folder / 'labels').iterdir():
        save(labels)(path)
    classes = len(settings.get('classes', 'ab'))
    try:
        text = look(dataset_of(folder, **settings), caplog, classes=classes)
    except InputError as error:
        text = str(error)
    assert expected in text


def test_validation_without_a_class_is_a_warning(folder, caplog):
    for path in (folder / 'labels').iterdir():
        save(LABELS * np.uint8(255))(path)
    text = look(dataset_of(folder), caplog, 'val_dataloader')
    assert '1 of 2 classes will be missing from the metrics' in text and 'thing' in text and '255 (14.6%)' in text
    for path in (folder / 'labels').iterdir():
        save(np.full_like(LABELS, 255))(path)
    assert 'the metrics will mean nothing' in look(dataset_of(folder), caplog, 'val_dataloader')


@pytest.mark.parametrize('wrap', [lambda d: RepeatDataset(d, 2), lambda d: ConcatDataset([d, d])])
def test_data_sets_in_others_are_looked_through(folder, caplog, wrap):
    assert 'train_dataloader: ' in look(wrap(dataset_of(folder)), caplog)
    (folder / 'labels/2.png').unlink()
    with pytest.raises(InputError, match=r'labels/2.png. does not exist'):
        look(wrap(dataset_of(folder)), caplog)


def test_label_maps_without_images_and_other_suffixes_are_named(folder, caplog):
    save(LABELS)(folder / 'labels/9.png')
    assert '1 of 4 label maps' in look(dataset_of(folder), caplog) and "'9.png'" in caplog.text
    save(PICTURE)(folder / 'images/5.bmp')
    assert '1 images of' in look(dataset_of(folder), caplog) and "'5.bmp'" in caplog.text


def test_more_files_than_time_are_sampled_and_that_is_said(folder, caplog, monkeypatch):
    monkeypatch.setattr('mmvim.engine.label_scan.VALUE_SECONDS', 0.0)
    assert '3 label maps are there; sizes of 3 and values of 0 checked' in look(dataset_of(folder), caplog)


def test_half_the_size_is_legal_where_both_are_resized_to_one(folder, caplog):
    save(LABELS[::2, ::2])(folder / 'labels/1.png')
    resize = dict(type='Resize', scale=(32, 24), keep_ratio=False)
    look(dataset_of(folder, [*PIPELINE[:2], resize, PIPELINE[2]]), caplog)
    save(LABELS.T.copy())(folder / 'labels/1.png')
    with pytest.raises(InputError, match='EXIF rotation'):
        look(dataset_of(folder, [*PIPELINE[:2], resize, PIPELINE[2]]), caplog)


def test_an_error_in_a_pipeline_names_the_sample(folder):
    crop = dict(type='RandomCrop', crop_size=(8, 8), cat_max_ratio='x')
    dataset = dataset_of(folder, [*PIPELINE[:2], crop, PIPELINE[2]])
    with pytest.raises(InputError, match=r"images/0.png' with label map '.*labels/0.png' fails in RandomCrop .TypeErr"):
        dataset[0]


def test_jpeg_label_maps_are_named_though_their_values_are_legal(folder, caplog):
    jpeg(np.zeros_like(LABELS))(folder / 'labels/1.png')
    assert '1 label maps are JPEG files' in look(dataset_of(folder), caplog) and 'labels/1.png' in caplog.text


def test_a_class_that_is_named_twice_is_refused(folder, caplog):
    with pytest.raises(InputError, match="train_dataloader: classes names 'ground' twice"):
        look(dataset_of(folder, classes=('ground', 'ground')), caplog)


DEEP = {
    'grey': (PICTURE[..., 0].astype(np.uint16) * 16, '.png'),
    'colour': (PICTURE.astype(np.uint16) * 16, '.png'),
    'TIFF': (PICTURE[..., 0].astype(np.uint16) * 16, '.tif'),
    'float': (PICTURE[..., 0].astype(np.float32) * 16, '.tif'),
}


@pytest.mark.parametrize('kind', DEEP)
def test_images_of_more_than_8_bits_are_named_or_scaled(folder, caplog, monkeypatch, kind):
    array, suffix = DEEP[kind]
    for i in range(3):
        (folder / 'images' / f'{i}.png').unlink()
        cv2.imwrite(str(folder / 'images' / f'{i}{suffix}'), array)
    monkeypatch.setattr(MMLogger.get_current_instance(), 'handle', caplog.handler.handle)
    remedy = "mmvim.LoadImageFromFile' and value_range"
    if kind == 'float':
        with pytest.raises(InputError, match=f'32 bits per value, which this pipeline cannot read: .*{remedy}'):
            look(dataset_of(folder, img_suffix=suffix), caplog)
    else:
        text = look(dataset_of(folder, img_suffix=suffix), caplog)
        assert text.count('16 bits per value, of which the lower 8 are dropped') == 1 and remedy in text
    caplog.clear()
    scaled = [dict(type='mmvim.LoadImageFromFile', value_range=(0, 16 * 255)), *PIPELINE[1:]]
    dataset = dataset_of(folder, scaled, img_suffix=suffix)
    assert 'bits' not in look(dataset, caplog)
    image = dataset[0]['inputs'].numpy().transpose(1, 2, 0)
    assert (image == (array if array.ndim == 3 else array[..., None]).astype(float) / 16).all()


@pytest.mark.parametrize('orientation', [2, 3, 4])
def test_an_orientation_that_keeps_the_size_is_a_warning(folder, caplog, orientation):
    with_orientation(orientation)(folder / 'images/1.png')
    assert f'1 images have an EXIF orientation ({orientation})' in look(dataset_of(folder), caplog)
