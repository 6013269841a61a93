"""Images of every kind: read as they are meant, or named in one line, without a hang or gigabytes of memory."""

import io
import os
import struct
import zlib

import cv2
import numpy as np
import pytest
from mmengine.logging import MMLogger
from mmengine.registry import DefaultScope
from PIL import Image

from mmvim.datasets.transforms import LoadImageFromFile, decode_image
from mmvim.errors import DataError
from mmvim.pixels import image_of_array

RNG = np.random.default_rng(0)
GREY = RNG.integers(0, 256, (20, 30), np.uint8)
COLOUR = RNG.integers(0, 256, (20, 30, 3), np.uint8)
DEEP = (RNG.random((20, 30)) * 4000).astype(np.uint16)
REAL = RNG.random((20, 30)).astype(np.float32)


def saved(array, kind, mode=None, **settings):
    buffer = io.BytesIO()
    Image.fromarray(array, mode).save(buffer, kind, **settings)
    return buffer.getvalue()


def several(kind):
    return saved(GREY, kind, save_all=True, append_images=[Image.new('L', (30, 20))])


def bomb(side):
    """A PNG of a few kilobytes whose header asks for side x side pixels."""

    def chunk(kind, data):
        return struct.pack('>I', len(data)) + kind + data + struct.pack('>I', zlib.crc32(kind + data))

    header = struct.pack('>IIBBBBB', side, side, 8, 2, 0, 0, 0)
    return (
        b'\x89PNG\r\n\x1a\n'
        + chunk(b'IHDR', header)
        + chunk(b'IDAT', zlib.compress(b'\0' * 9999))
        + chunk(b'IEND', b'')
    )


@pytest.fixture
def log(caplog):
    logger = MMLogger.get_current_instance()
    logger.addHandler(caplog.handler)
    yield caplog
    logger.removeHandler(caplog.handler)


FINE = {
    'grey JPEG': saved(GREY, 'JPEG'),
    'grey PNG': saved(GREY, 'PNG'),
    'bilevel PNG': saved(GREY > 99, 'PNG'),
    'bilevel TIFF': saved(GREY > 99, 'TIFF'),
    'palette': saved(COLOUR, 'GIF'),
    'RGBA': saved(np.dstack([COLOUR, GREY]), 'PNG'),
    'grey and alpha': saved(np.dstack([GREY, GREY]), 'PNG', 'LA'),
    'CMYK JPEG': saved(np.dstack([COLOUR, GREY]), 'JPEG', 'CMYK'),
    'CMYK TIFF': saved(np.dstack([COLOUR, GREY]), 'TIFF', 'CMYK'),
    'progressive': saved(COLOUR, 'JPEG', progressive=True),
    **{kind: saved(COLOUR, kind) for kind in ('BMP', 'PPM', 'WEBP', 'JPEG2000', 'TIFF')},
}


@pytest.mark.parametrize('kind', FINE)
def test_images_of_8_bits_are_read_whatever_their_suffix(tmp_path, log, kind):
    path = tmp_path / 'image.jpg'
    path.write_bytes(FINE[kind])
    image = LoadImageFromFile().transform(dict(img_path=str(path), height=20, width=30))['img']
    assert image.shape == (20, 30, 3) and image.dtype == np.uint8
    assert np.ptp(image) > 100 and not log.records


@pytest.mark.parametrize('kind', ['GIF', 'TIFF', 'WEBP'])
def test_the_first_of_several_pictures_is_used_with_a_warning(tmp_path, log, kind):
    assert decode_image(several(kind), f'{tmp_path}/x').shape == (20, 30, 3)
    assert 'holds 2 pictures, of which the first is used' in log.text


@pytest.mark.parametrize('suffix', ['.png', '.tif', '.pgm'])
@pytest.mark.parametrize('array', [DEEP, np.dstack([DEEP] * 3)], ids=['grey', 'colour'])
def test_16_bits_are_scaled_as_asked_for_or_named_once(tmp_path, log, suffix, array):
    data = cv2.imencode(suffix if array.ndim == 2 or suffix != '.pgm' else '.ppm', array)[1].tobytes()
    expected = np.rint(DEEP.astype(np.float64).clip(0, 3000) / 3000 * 255)
    image = decode_image(data, 'x', value_range=(0, 3000))
    assert image.dtype == np.uint8 and not log.records
    assert all(np.abs(image[..., channel] - expected).max() <= 1 for channel in range(3))
    for name in 'ab':
        cut = decode_image(data, f'{tmp_path}/{name}')
    assert np.array_equal(cut[..., 0], DEEP >> 8)
    assert log.text.count(f'has 16 bits per value ({DEEP.min()} to {DEEP.max()})') == 1
    assert f'set value_range=[{DEEP.min()},{DEEP.max()}]' in log.text


@pytest.mark.parametrize('array', [REAL, (REAL * 1e6).astype(np.int32)], ids=['float', 'int32'])
def test_real_numbers_need_a_range(array):
    data = saved(array, 'TIFF')
    with pytest.raises(DataError, match=f"image 'x' has values of type {array.dtype} .*: set value_range"):
        decode_image(data, 'x')
    image = decode_image(data, 'x', value_range=(0, float(array.max())))
    assert np.abs(image[..., 0] - REAL / REAL.max() * 255).max() <= 1
    with pytest.raises(DataError, match='Pillow cuts off'):
        decode_image(data, 'x', backend='pillow')


def test_a_range_that_is_none_is_refused():
    for value in ([1], (5, 5), (9, 1), 'ab', (True, 3), 255, (0, '9')):
        with pytest.raises(ValueError, match='value_range must be'):
            LoadImageFromFile(value_range=value)
    with pytest.raises(ValueError, match='value_range needs'):
        LoadImageFromFile(value_range=(0, 9), imdecode_backend='pillow')


BROKEN = {
    'nothing': b'',
    'text': b'<html>not found</html>',
    'a JSON': b'{"images": []}',
    'half': saved(COLOUR, 'PNG')[:300],
    'half a TIFF': saved(COLOUR, 'TIFF')[:300],
    'half a GIF': saved(COLOUR, 'GIF')[:300],
    'header alone': saved(COLOUR, 'JPEG')[:2],
    'zeros': bytes(5000),
    'bomb': bomb(30_000),
    'larger bomb': bomb(2**31 - 1),
    'OpenEXR': b'v/1\x01' + bytes(60),
    'other size': saved(COLOUR[:10], 'PNG'),
    'rotated': saved(COLOUR.transpose(1, 0, 2), 'PNG'),
}


@pytest.mark.parametrize('stated', [True, False])
@pytest.mark.parametrize('kind', BROKEN)
def test_what_cannot_be_used_is_named_in_one_line(tmp_path, kind, stated):
    if not stated and kind in ('other size', 'rotated'):
        pytest.skip('any size is right if none is stated')
    path = tmp_path / 'image.png'
    path.write_bytes(BROKEN[kind])
    sample = dict(img_path=str(path), **(dict(height=20, width=30) if stated else {}))
    with pytest.raises(DataError, match=r"image '.*image\.png' (cannot be read|has \d+ rows)") as raised:
        LoadImageFromFile().transform(sample)
    assert '\n' not in str(raised.value).strip()


def test_nothing_waits_for_a_pipe(tmp_path):
    os.mkfifo(tmp_path / 'x.png')
    for path, what in ((tmp_path / 'x.png', 'a pipe'), (tmp_path, 'a folder'), ('/dev/zero', 'a device')):
        with pytest.raises(DataError, match=f'is {what}: correct its name'):
            LoadImageFromFile().transform(dict(img_path=str(path)))


@pytest.mark.parametrize('host', ['mmdet', 'mmseg'])
def test_arrays_in_the_loaders_of_the_hosts(log, host):
    pytest.importorskip(host)
    import mmdet.datasets.transforms  # noqa: F401
    import mmseg.datasets.transforms  # noqa: F401
    from mmengine.registry import TRANSFORMS

    with DefaultScope.overwrite_default_scope(host):
        load = TRANSFORMS.build(dict(type=f'{host}.InferencerLoader'))
        deep = TRANSFORMS.build(dict(type=f'{host}.InferencerLoader', value_range=(0, 4000)))
        one = TRANSFORMS.build(dict(type=f'{host}.LoadImageFromNDArray', value_range=(0, 4000)))
    for array in (GREY, GREY[..., None], GREY.astype(np.int64), GREY.astype(np.float32)):
        result = load(array)
        assert np.array_equal(result['img'], np.dstack([GREY] * 3)) and result['img_shape'] == (20, 30)
    assert np.array_equal(load(np.dstack([COLOUR, GREY]))['img'], COLOUR)
    assert load(COLOUR)['img'] is COLOUR or np.array_equal(load(COLOUR)['img'], COLOUR)
    for loaded in (deep(DEEP), one(dict(img=DEEP))):
        assert np.abs(loaded['img'][..., 2] - DEEP / 4000 * 255).max() <= 1
    assert np.array_equal(load(DEEP)['img'][..., 0], DEEP >> 8)


@pytest.mark.parametrize(
    'array, message',
    [
        (np.full((4, 4), np.nan, np.float32), 'float32 .*: pass numbers from 0 to 255'),
        (-GREY.astype(int), r'int64 with values -\d+ to 0 .*: pass numbers from 0 to 255'),
        (GREY.astype(int) + 255, 'pass numbers from 0 to 255'),
        (GREY > 9, 'bool'),
        (COLOUR.transpose(2, 0, 1), r'shape \(3, 20, 30\) is no image'),
        (COLOUR[None], 'is no image'),
        (GREY[0], 'is no image'),
        (COLOUR[:0], 'is no image'),
        (COLOUR.astype(str), 'type <U3 is no image'),
        (COLOUR.astype(object), 'type object'),
    ],
)
def test_arrays_that_are_no_images(array, message):
    with pytest.raises(DataError, match=message):
        image_of_array(array)


def test_arrays_of_other_models_are_left_alone(log):
    many = RNG.random((20, 30, 6))
    assert np.array_equal(image_of_array(many), many.astype(np.float32))
    image_of_array(-REAL)
    assert log.text.count('models for files expect 0 to 255') == 1
    import mmdet.datasets.transforms  # noqa: F401
    from mmengine.registry import TRANSFORMS

    with DefaultScope.overwrite_default_scope('mmdet'):
        load = TRANSFORMS.build(dict(type='LoadImageFromNDArray', color_type='unchanged'))
    for array in (GREY, DEEP, REAL, np.dstack([COLOUR, GREY])):
        assert load(dict(img=array))['img'] is array
