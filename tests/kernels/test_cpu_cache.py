"""Damaged, unwritable and full caches of compiled kernels: they are rebuilt, or done without."""

import os
import subprocess
import sys
from pathlib import Path

import pytest

KERNELS = Path(__file__).parents[2] / 'kernels'
SCRIPT = """
import sys
from pathlib import Path
import numpy as np
from ssm_kernels.cpu_vectors import compile_worker

PARAMS = np.dtype([('x', np.int64), ('scale', np.float64)])

def make(stamp):
    def worker(params):
        x = stamp  # noqa: F841
    return worker

def files(kind):
    found = sorted(Path(sys.argv[1]).rglob('*.' + kind))
    assert found, kind
    return found

def flip(content):
    middle = len(content) // 2
    return content[:middle] + bytes(255 - byte for byte in content[middle:middle + 64]) + content[middle + 64:]

DAMAGE = {
    'empty': lambda content: b'',
    'half': lambda content: content[:len(content) // 2],
    'one byte less': lambda content: content[:-1],
    'zeros': lambda content: bytes(len(content)),
    'text': lambda content: b'garbage ' * 9,
    'flipped': flip,
    'another pickle': lambda content: __import__('pickle').dumps('0.61') + __import__('pickle').dumps((1, 2)),
    'version alone': lambda content: __import__('pickle').dumps(__import__('numba').__version__),
}

def hits():
    return compile_worker(make, PARAMS).cache_hits

assert hits() == 0 and hits() == 1
for name, damage in DAMAGE.items():
    for kind in ('nbi', 'nbc'):
        for file in files(kind):
            file.write_bytes(damage(file.read_bytes()))
        assert hits() == 0, (name, kind, 'taken for good')
        assert hits() == 1, (name, kind, 'not rebuilt')
for kind in ('nbi', 'nbc'):  # a folder in place of a file: no code can be saved, yet it compiles
    for file in files(kind):
        file.unlink()
        file.mkdir()
    assert hits() == 0, kind
    for file in files(kind):
        file.rmdir()
    assert hits() == 0 and hits() == 1, kind
import resource  # a full disk
for file in files('nbi'):
    file.unlink()
import signal
signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
resource.setrlimit(resource.RLIMIT_FSIZE, (64, resource.RLIM_INFINITY))
assert hits() == 0 and hits() == 0
resource.setrlimit(resource.RLIMIT_FSIZE, (resource.RLIM_INFINITY, resource.RLIM_INFINITY))
assert hits() == 0 and hits() == 1
"""


@pytest.mark.skipif(sys.platform == 'win32', reason='limits of file sizes are POSIX')
def test_a_damaged_or_full_cache_is_rebuilt(tmp_path):
    (tmp_path / 'script.py').write_text(SCRIPT)
    environment = os.environ | {'PYTHONPATH': str(KERNELS), 'NUMBA_CACHE_DIR': str(tmp_path / 'cache')}
    command = [sys.executable, 'script.py', str(tmp_path / 'cache')]
    done = subprocess.run(command, cwd=tmp_path, env=environment, capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stderr[-2000:]
