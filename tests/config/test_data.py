"""Data sets without images, as the runner builds them."""

import json

import pytest
from mmengine.registry import init_default_scope

from mmvim.config.data import check_data_root
from mmvim.datasets.shapes_segmentation import ShapesSegDataset
from mmvim.engine.runner import Runner
from mmvim.errors import DataError


def build(dataset):
    loader = dict(batch_size=1, num_workers=0, sampler=dict(type='DefaultSampler', shuffle=False), dataset=dataset)
    return Runner.build_dataloader(loader)


@pytest.fixture
def folder(tmp_path):
    """Three images and label maps; a data set does not open them when it is built."""
    init_default_scope('mmseg')
    for kind, suffix in (('images', '.jpeg'), ('labels', '.png'), ('empty', None)):
        (tmp_path / kind / 'day').mkdir(parents=True)
        for i in range(3 if suffix else 0):
            (tmp_path / kind / 'day' / f'{i}{suffix}').touch()
    (tmp_path / 'images' / 'README').touch()
    return tmp_path


def of(folder, images='images', **settings):
    prefix = dict(img_path=images, seg_map_path='labels')
    settings = dict(type='BaseSegDataset', metainfo=dict(classes=('a', 'b')), **settings)
    return dict(data_root=str(folder), data_prefix=prefix, pipeline=[], **settings)


def test_images_of_another_suffix(folder):
    assert len(build(of(folder, img_suffix='.jpeg')).dataset) == 3
    with pytest.raises(DataError) as raised:
        build(of(folder))
    assert str(raised.value) == (
        f"image folder '{folder}/images' of BaseSegDataset holds 4 files (3 '.jpeg', 1 'README'), none of which ends "
        "in img_suffix='.jpg': set img_suffix, and seg_map_suffix for the label maps, or name another folder in "
        'data_prefix.img_path'
    )


def test_an_empty_folder_beside_one_with_images(folder):
    joined = [of(folder, img_suffix='.jpeg'), of(folder, 'empty', img_suffix='.jpeg')]
    with pytest.raises(DataError, match="image folder '.*/empty' of BaseSegDataset holds no files: name another"):
        build(dict(type='RepeatDataset', times=2, dataset=dict(type='ConcatDataset', datasets=joined)))


def test_the_suffix_of_a_data_set_of_the_host(folder):
    with pytest.raises(DataError, match=r"CityscapesDataset holds 4 files .* img_suffix='_leftImg8bit.png': set"):
        build(dict(of(folder), type='CityscapesDataset', metainfo=None))


def test_a_list_without_names(folder):
    (folder / 'train.txt').touch()
    with pytest.raises(DataError, match=r"no image is left in a data set \(BaseSegDataset of 'train.txt'\): check ann"):
        build(of(folder, ann_file='train.txt'))


def test_annotations_of_no_image(folder):
    init_default_scope('mmdet')
    content = dict(images=[], annotations=[], categories=[dict(id=1, name='a')])
    (folder / 'none.json').write_text(json.dumps(content))
    dataset = dict(type='CocoDataset', data_root=str(folder), ann_file='none.json', metainfo=dict(classes=('a',)))
    with pytest.raises(DataError, match=r"CocoDataset of 'none.json'\): check ann_file"):
        build(dict(dataset, data_prefix=dict(img='images'), pipeline=[]))


def test_other_errors_stay_as_they_are(folder):
    with pytest.raises(ValueError, match='is not a') as raised:
        build(dict(of(folder), type='CityscapesDataset'))
    assert not isinstance(raised.value, DataError)


def test_a_data_set_derived_from_ours_sees_to_its_folder_itself(folder):
    class Mine(ShapesSegDataset):
        """Generates its folder as its base does."""

    gone = str(folder / 'gone')
    check_data_root(dict(type=Mine, data_root=gone))
    with pytest.raises(DataError, match=f"data folder '{gone}' of BaseSegDataset does not exist"):
        check_data_root(dict(type='BaseSegDataset', data_root=gone))
