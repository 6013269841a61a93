"""Published numbers: a metafile and the README's row of the same config have the same, and those of the papers."""

from pathlib import Path

import pytest
import yaml

CONFIGS = Path(__file__).parents[2] / 'configs'

# arXiv 2407.08083 and the listings of the published files: (what, of which config, value or None for none)
MAMBAVISION = [
    ('box AP', 'mask-rcnn_mambavision-t_fpn_1x_coco', None),
    ('box AP', 'mask-rcnn_mambavision-t_fpn_amp-ms-crop-3x_coco', 46.4),
    ('mask AP', 'mask-rcnn_mambavision-t_fpn_amp-ms-crop-3x_coco', 41.8),
    ('mIoU', 'upernet_mambavision-l3_8xb2-160k_ade20k-640x640', 53.2),
    ('top-1 accuracy', 'mambavision-l3_32xb128_in1k-256px', 87.3),
    ('FLOPs', 'mambavision-t2_32xb128_in1k', 5.1),
    ('FLOPs', 'mambavision-l_32xb128_in1k', 34.9),
    ('FLOPs', 'mambavision-l2_32xb128_in1k', 37.5),
    ('FLOPs', 'mambavision-l2_32xb128_in1k-512px', 196.3),
    ('FLOPs', 'mambavision-l3_32xb128_in1k-256px', 122.3),
    ('FLOPs', 'mambavision-l3_32xb128_in1k-512px', 489.1),
]


def rows(folder):
    """Lines of the README's tables by the config that they begin with."""
    found = {}
    for line in (CONFIGS / folder / 'README.md').read_text().splitlines():
        if line.startswith('| `') and line.split('`')[1].endswith('.py'):
            found.setdefault(line.split('`')[1].removesuffix('.py'), line)
    return found


def published(folder):
    """Published numbers of the metafile: (what, config) -> value; FLOPs in 1e9."""
    found = {}
    for model in yaml.safe_load((CONFIGS / folder / 'metafile.yml').read_text())['Models']:
        numbers = dict(model['Metadata'])
        for result in model.get('Results', ()):
            numbers |= result['Metrics']
        for name, value in numbers.items():
            if name.endswith(' (published)') and not name.startswith('Parameters'):
                value = float(value) / 1e9 if name.startswith('FLOPs') else value
                found[name.removesuffix(' (published)'), model['Name']] = value
    return found


@pytest.mark.parametrize('folder', ['vim', 'deit', 'mambavision', 'hier_vim'])
def test_published_numbers_of_metafile_and_readme_agree(folder):
    lines = rows(folder)
    for (what, config), value in published(folder).items():
        assert str(value) in lines[config], f'{what} of {config}'


@pytest.mark.parametrize('what, config, value', MAMBAVISION)
def test_published_numbers_of_mambavision(what, config, value):
    assert published('mambavision').get((what, config)) == value
    assert value is not None or not any(char.isdigit() for char in rows('mambavision')[config].split('|')[4])
