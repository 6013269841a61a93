"""Configs for the tests of this folder, which import config_runs beside them by its plain name."""

import copy
import functools
import sys
from importlib import import_module
from pathlib import Path

import pytest
from mmengine.registry import init_default_scope

sys.path.insert(0, str(Path(__file__).parent))
CLASSIFIERS = ('vim/vim-ti_folder.py', 'mambavision/mambavision-t_folder.py')


@pytest.fixture(scope='session')
def read(load_config, tmp_path_factory):
    """Read a config, each but once: mmengine reads all metafiles of a host for each base that is a host's."""
    folder = tmp_path_factory.mktemp('data')
    classes = '[{"id": 1, "name": "a"}, {"id": 2, "name": "b"}]'
    (folder / 'a.json').write_text(f'{{"images": [], "annotations": [], "categories": {classes}}}')

    for name in 'ab':
        (folder / 'train' / name).mkdir(parents=True)

    @functools.cache
    def read(name):
        keys = {}
        if 'folder' in name:
            own = dict(classes=['a', 'b', 'c']) if 'upernet' in name else dict(train_ann='a.json', val_ann='a.json')
            own = dict() if name in CLASSIFIERS else own
            keys = dict(data_root=str(folder), **own)
        return load_config(name, **keys)

    return read


@pytest.fixture
def load(read):
    """Function (path below configs) that gives a config of one's own, whose model can be built."""

    def load(name):
        cfg = copy.deepcopy(read(name))
        init_default_scope(cfg.default_scope)
        import_module(f'{cfg.default_scope}.models')  # not first under torch.device('meta')
        if 'data_preprocessor' not in cfg.model:
            cfg.model.data_preprocessor = cfg.data_preprocessor  # as a runner does
        return cfg

    return load
