"""Every image has its own file, whatever its folder and name."""

import os

import pytest

from mmvim.compat.output_names import OutputNames

CLASHING = {
    'folders': ['a/1.png', 'b/1.png'],
    'suffixes': ['a/1.png', 'a/1.jpg'],
    'both': ['a/1.png', 'a/1.jpg', 'b/1.png', 'b/1.jpg'],
    'roots': ['/x/a/1.png', '/y/a/1.png', '/z/1.png'],
    'absolute and relative': ['a/1.png', '/a/1.png', '../a/1.png'],
    'case': ['a/1.png', 'b/1.PNG', 'b/X.png', 'a/x.png'],
    'a name like the joined one': ['a/1.png', 'b/1.png', 'a_1.png', 'b_1.png', 'c/a_1.png'],
    'dots': ['photo.v1.jpg', 'photo.v2.jpg', 'b/photo.v1.jpg'],
    'no suffix': ['a/1', 'b/1', '1'],
}
KINDS = {
    'as the image': lambda path: os.path.basename(path),
    'label map': lambda path: os.path.splitext(os.path.basename(path))[0] + '.png',
    'step': lambda path: os.path.basename(path) + '_0.png',
    'last suffix twice': lambda path: os.path.splitext(os.path.splitext(os.path.basename(path))[0])[0] + '.png',
}


@pytest.mark.parametrize('announced', [None, False, True])
@pytest.mark.parametrize('kind', KINDS)
@pytest.mark.parametrize('paths', CLASHING.values(), ids=CLASHING)
def test_names_differ_and_stay(paths, kind, announced):
    names = OutputNames()
    if announced is not None:
        names.announce(paths, by_stem=announced)
    found = [names.of(os.path.join('out', KINDS[kind](path)), path) for path in paths]
    assert len({file.casefold() for file in found}) == len(paths), found
    assert all(os.path.dirname(file) == 'out' for file in found)
    assert found == [names.of(os.path.join('out', KINDS[kind](path)), path) for path in paths]


def test_names_are_the_images_unless_they_clash():
    names = OutputNames()
    names.announce(['root/a/1.png', 'root/b/2.png', 'root/c/2.png'])
    assert [names.of(f'out/{path[-5:]}', f'root/{path}') for path in ('a/1.png', 'b/2.png', 'c/2.png')] == [
        'out/1.png',
        'out/b_2.png',
        'out/c_2.png',
    ]
    assert names.of('elsewhere/1.png', 'root/x/1.png') == 'elsewhere/1.png'


def test_every_array_is_a_new_image():
    names = OutputNames()
    assert [names.of('out/0.png', None) for _ in range(3)] == ['out/0.png', 'out/0_2.png', 'out/0_3.png']


def test_names_of_one_process_are_free_in_all():
    """Each process of a test writes its own part of the images and knows nothing of the others."""
    for by_stem in (False, True):
        paths = ['a/1.png', 'b/1.png', 'a_1.png', 'b_1.png', 'c/a_1.png', 'a/1.jpg']
        found = []
        for path in paths:
            names = OutputNames()
            names.announce(paths, by_stem)
            found.append(names.of('out/' + KINDS['label map' if by_stem else 'as the image'](path), path))
        assert len(set(found)) == len(paths), found
