"""What a user installs: the wheel and an editable install, each in a virtual environment of its own."""

import json
import os
import shutil
import subprocess
import sys
import sysconfig
import venv
import zipfile
from email.parser import Parser
from pathlib import Path

import pytest
import yaml

from mmvim.compat.versions import TESTED_FROM
from mmvim.version import __version__

ROOT = Path(__file__).parents[2]
SOURCES = ('setup.py', 'pyproject.toml', 'MANIFEST.in', 'LICENSE', 'README.md', 'model-index.yml')
FOLDERS = ('mmvim', 'kernels', 'configs', 'tools')


def pip(*arguments: str) -> None:
    command = [sys.executable, '-m', 'pip', '--disable-pip-version-check', *arguments]
    result = subprocess.run(command, capture_output=True, text=True, timeout=300)
    assert result.returncode == 0, result.stdout + result.stderr


@pytest.fixture(scope='module')
def source_tree(tmp_path_factory) -> Path:
    tree = tmp_path_factory.mktemp('source')
    for name in SOURCES:
        shutil.copy(ROOT / name, tree)
    for name in FOLDERS:
        shutil.copytree(ROOT / name, tree / name, ignore=shutil.ignore_patterns('.mim', '__pycache__', '*.egg-info'))
    return tree


@pytest.fixture(scope='module')
def wheel(source_tree, tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp('wheel')
    pip('wheel', '--no-deps', '--no-build-isolation', '--no-index', '-w', str(folder), str(source_tree))
    (path,) = folder.glob('*.whl')
    return path


@pytest.fixture
def empty_environment(tmp_path) -> Path:
    """Python of a new environment without mmvim that sees every other package of this one."""
    venv.create(tmp_path / 'venv', with_pip=False)
    python = tmp_path / 'venv' / ('Scripts' if os.name == 'nt' else 'bin') / 'python'
    packages = subprocess.run(
        [python, '-c', 'import sysconfig; print(sysconfig.get_path("purelib"))'],
        capture_output=True,
        text=True,
        check=True,
    ).stdout.strip()
    (Path(packages) / 'hosts.pth').write_text(sysconfig.get_path('purelib'))
    return python


def configs_of(tree: Path) -> list[str]:
    configs = tree / 'configs'
    return sorted(path.relative_to(configs).as_posix() for path in configs.rglob('*.py') if '_base_' not in path.parts)


def test_every_listed_metafile_exists():
    for metafile in yaml.safe_load((ROOT / 'model-index.yml').read_text())['Import']:
        for model in yaml.safe_load((ROOT / metafile).read_text())['Models']:
            assert (ROOT / model['Config']).is_file(), f'{metafile} names {model["Config"]}'


def test_every_metafile_is_listed():
    listed = set(yaml.safe_load((ROOT / 'model-index.yml').read_text())['Import'])
    assert listed == {path.relative_to(ROOT).as_posix() for path in (ROOT / 'configs').rglob('metafile.yml')}


DISTRIBUTIONS = {
    'mmengine': 'onedl-mmengine',
    'mmcv': 'onedl-mmcv',
    'mmdet': 'onedl-mmdetection',
    'mmseg': 'onedl-mmsegmentation',
    'mmpretrain': 'onedl-mmpretrain',
}


@pytest.mark.parametrize('module', TESTED_FROM)
def test_lower_bounds_are_the_tested_versions(module):
    assert f'"{DISTRIBUTIONS[module]}>={TESTED_FROM[module]}"' in (ROOT / 'pyproject.toml').read_text()


@pytest.mark.slow
def test_wheel_contents(wheel, source_tree):
    assert wheel.name == f'mmvim-{__version__}-py3-none-any.whl'
    with zipfile.ZipFile(wheel) as archive:
        names = [name for name in archive.namelist() if not name.endswith('/')]
        info = f'mmvim-{__version__}.dist-info'
        assert {name.split('/')[0] for name in names} == {'mmvim', 'ssm_kernels', info}
        assert archive.read(f'{info}/top_level.txt').decode().split() == ['mmvim', 'ssm_kernels']
        metadata = Parser().parsestr(archive.read(f'{info}/METADATA').decode())
        assert {f'{info}/licenses/LICENSE', 'ssm_kernels/py.typed'} <= set(names)

    for package, folder in ('mmvim', ROOT / 'mmvim'), ('ssm_kernels', ROOT / 'kernels' / 'ssm_kernels'):
        modules = {f'{package}/{path.relative_to(folder).as_posix()}' for path in folder.rglob('*.py')}
        assert {module for module in modules if '/.mim/' not in module} <= set(names)

    carried = {name.removeprefix('mmvim/.mim/') for name in names if name.startswith('mmvim/.mim/')}
    expected = {'model-index.yml'}
    for folder in 'configs', 'tools':
        expected |= {p.relative_to(source_tree).as_posix() for p in (source_tree / folder).rglob('*') if p.is_file()}
    assert carried == expected

    assert metadata['License-Expression'] == 'Apache-2.0'
    assert metadata['Requires-Python'] == '>=3.10'
    required = metadata.get_all('Requires-Dist')
    assert {line.split(';')[0].split('>')[0].strip() for line in required if 'extra ==' not in line} == {
        'torch',
        'numpy',
        'triton',
    }


LOAD_CONFIGS = """
import json, sys
from pathlib import Path
import mmvim, ssm_kernels
from mmengine.config import Config
from mmengine.registry import DefaultScope

scopes = {}
configs = Path(mmvim.__file__).parent / '.mim' / 'configs'
for name in json.loads(sys.stdin.read()):
    Path('downstream.py').write_text(f"_base_ = 'mmvim::{name}'\\n")
    inherited, direct = Config.fromfile('downstream.py'), Config.fromfile(configs / name)
    assert set(inherited) == set(direct), name
    scopes[name] = inherited.model.get('_scope_')
print(json.dumps({'mmvim': mmvim.__file__, 'ssm_kernels': ssm_kernels.__file__, 'scopes': scopes}))
"""


def load_configs(python: Path, configs: list[str], folder: Path) -> dict:
    work = folder / 'downstream'
    work.mkdir()
    (work / 'load.py').write_text(LOAD_CONFIGS)
    result = subprocess.run(
        [python, '-W', 'ignore', 'load.py'], cwd=work, input=json.dumps(configs), capture_output=True, text=True
    )
    assert result.returncode == 0, result.stdout + result.stderr
    return json.loads(result.stdout.splitlines()[-1])


@pytest.mark.slow
def test_configs_are_inherited_from_an_installed_wheel(wheel, source_tree, empty_environment, tmp_path):
    pip('--python', str(empty_environment), 'install', '--no-deps', '--no-index', str(wheel))
    configs = configs_of(source_tree)
    assert configs
    found = load_configs(empty_environment, configs, tmp_path)
    for package in 'mmvim', 'ssm_kernels':
        assert Path(found[package]).is_relative_to(empty_environment.parents[1])
    assert set(found['scopes'].values()) <= {'mmdet', 'mmseg', 'mmpretrain'}


@pytest.mark.slow
def test_an_editable_install_sees_edits_of_configs(source_tree, empty_environment, tmp_path):
    tree = tmp_path / 'editable'
    shutil.copytree(source_tree, tree, ignore=shutil.ignore_patterns('build', '*.egg-info'))
    pip(
        '--python',
        str(empty_environment),
        'install',
        '--no-deps',
        '--no-index',
        '--no-build-isolation',
        '-e',
        str(tree),
    )
    (tree / 'configs' / 'demo').mkdir(exist_ok=True)
    (tree / 'configs' / 'demo' / 'new.py').write_text("default_scope = 'mmseg'\nmodel = dict(type='A')\n")
    found = load_configs(empty_environment, ['demo/new.py'], tmp_path)
    assert Path(found['mmvim']).is_relative_to(tree)
    assert Path(found['ssm_kernels']).is_relative_to(tree / 'kernels')
    assert found['scopes'] == {'demo/new.py': 'mmseg'}
