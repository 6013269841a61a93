"""The drawn shapes as label maps for MMSegmentation."""

import cv2
import numpy as np
import pytest
from mmengine.registry import DATASETS

import mmvim  # noqa: F401
from mmvim.datasets.shapes import CLASSES

SMALL = dict(num_train=4, num_val=2, image_size=(64, 80), size_range=(16, 40))


@pytest.fixture
def dataset(load_config, tmp_path):
    """Function (split, root) that builds the data set of the demo config."""
    cfg = load_config('demo/upernet_mambavision_shapes.py')

    def build(split, root=tmp_path / 'shapes'):
        settings = cfg[f'{split}_dataloader'].dataset
        return DATASETS.build({**settings, '_scope_': 'mmseg', 'data_root': str(root), 'shapes': SMALL})

    return build


@pytest.mark.parametrize(('split', 'count'), [('train', 4), ('val', 2)])
def test_it_is_generated_and_gives_images_with_their_label_maps(dataset, tmp_path, split, count):
    data = dataset(split)
    assert len(data) == count
    assert data.metainfo['classes'] == ('background', *CLASSES) and len(data.metainfo['palette']) == 5
    for i in range(count):
        sample = data[i]
        label_map = sample['data_samples'].gt_sem_seg.data.numpy()[0]
        name = data.get_data_info(i)['img_path'].rpartition('/')[2]
        stored = cv2.imread(str(tmp_path / 'shapes' / 'label_maps' / split / name), cv2.IMREAD_UNCHANGED)
        flips = [stored, stored[::-1], stored[:, ::-1], stored[::-1, ::-1]]
        assert any(np.array_equal(label_map, flipped) for flipped in (flips if split == 'train' else flips[:1]))
        assert set(np.unique(label_map)) <= set(range(5)) and label_map.max() > 0
        assert tuple(sample['inputs'].shape) == (3, 64, 80)


def test_a_folder_of_other_things_is_refused(dataset, tmp_path):
    (tmp_path / 'mine').mkdir()
    (tmp_path / 'mine' / 'file').write_text('')
    with pytest.raises(FileExistsError, match='holds other files'):
        dataset('train', tmp_path / 'mine')
