"""Disks that are full, read-only or gone, and work directories that cannot be: one line, and what to do."""

import errno
import os
import re
import resource
import shutil
import signal
import subprocess
import sys
from pathlib import Path

import pytest
import torch

sys.path.insert(0, str(Path(__file__).parents[1] / 'engine'))
from tiny_training import EPOCHS, ITERATIONS, Classifier, build  # noqa: E402

from mmvim.tools.errors import explain  # noqa: E402


def line_of(function, *args, **kwargs):
    """The line that a tool would end with."""
    with pytest.raises(Exception) as raised:
        function(*args, **kwargs)
    text = explain(raised.value)
    assert text and '\n' not in text and len(text) < 500
    return text


@pytest.fixture
def small_files():
    """No file may be larger than 2,000 bytes, which a checkpoint finds out as on a full disk."""
    before = resource.getrlimit(resource.RLIMIT_FSIZE), signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
    resource.setrlimit(resource.RLIMIT_FSIZE, (2000, before[0][1]))
    yield
    resource.setrlimit(resource.RLIMIT_FSIZE, before[0])
    signal.signal(signal.SIGXFSZ, before[1])


def test_a_checkpoint_without_room_is_named(tmp_path, small_files):
    line = line_of(build(tmp_path / 'work', log_level='ERROR').train)
    assert re.match(rf"File too large: '{tmp_path}/work/[^']*iter_1[^']*'; .*--resume", line)


def test_a_full_device_is_named():
    def write():
        with open('/dev/full', 'wb', buffering=0) as file:
            file.write(b'x')

    assert line_of(write).startswith("No space left on device: '/dev/full'; free some space")


def test_torch_save_without_room(tmp_path, small_files):
    line = line_of(torch.save, torch.zeros(9999), str(tmp_path / 'x.pth'))
    assert 'could not be written: free some space' in line


@pytest.mark.parametrize('folder', ['file', 'file/below', 'x' * 300, '/proc/nowhere'])
def test_work_directories_that_cannot_be(tmp_path, folder):
    (tmp_path / 'file').touch()
    line = line_of(build, tmp_path / folder)
    assert '--work-dir' in line or 'check the paths' in line


def test_a_work_directory_that_vanishes(tmp_path):
    class Removes(Classifier):
        def train_step(self, data, optim_wrapper):
            shutil.rmtree(tmp_path / 'work', ignore_errors=True)
            return super().train_step(data, optim_wrapper)

    line = line_of(build(tmp_path / 'work', model=Removes(), train_cfg=dict(ITERATIONS, max_iters=20)).train)
    assert 'nor its folder; check the paths in the config, and that nobody removed the work directory' in line


def test_names_with_blanks_and_other_letters(tmp_path):
    work = tmp_path / 'größe mit Leerzeichen' / '日本'
    build(work, train_cfg=EPOCHS).train()
    build(work, train_cfg=dict(EPOCHS, max_epochs=3), resume=True).train()
    assert (work / 'epoch_3.pth').is_file()


@pytest.mark.parametrize('number', [errno.EDQUOT, errno.EROFS, errno.EIO, errno.EMFILE, errno.ESTALE])
def test_errors_that_cannot_be_made_here_have_a_remedy_too(number):
    line = explain(OSError(number, os.strerror(number), 'file.pth'))
    assert line.startswith(f"{os.strerror(number)}: 'file.pth'; ")


SCRIPT = """
import os, torch
os.environ.clear()
from ssm_kernels import selective_scan
u = torch.rand(1, 5, 4)
selective_scan(u, u, -torch.rand(4, 2), torch.rand(1, 5, 2), torch.rand(1, 5, 2), backend='numba')
import mmvim.engine
"""


@pytest.mark.slow
def test_no_home_and_no_folder_for_temporary_files(tmp_path):
    path = os.pathsep.join(sys.path)
    environment = dict(PYTHONPATH=path, HOME='/nonexistent', TMPDIR='/nonexistent', NUMBA_CACHE_DIR='/proc/nowhere')
    done = subprocess.run([sys.executable, '-c', SCRIPT], cwd=tmp_path, env=environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
