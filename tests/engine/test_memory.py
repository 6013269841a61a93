"""Freed memory, kept and returned, in processes of their own: the setting is one of the whole process."""

import os
import platform
import subprocess
import sys

import pytest

from mmvim.engine.memory import SETTINGS, keep_freed_memory

pytestmark = pytest.mark.skipif(platform.libc_ver()[0] != 'glibc', reason='glibc alone has these settings')

MIB = 64
PROGRAM = f"""
import resource, sys
from pathlib import Path
import torch
from mmvim.engine.memory import keep_freed_memory, return_freed_memory

def faults():
    return resource.getrusage(resource.RUSAGE_SELF).ru_minflt

def resident():
    return int(Path('/proc/self/statm').read_text().split()[1]) * resource.getpagesize() / 2**20

def use(count):
    for _ in range(count):
        torch.ones({MIB}, 2**18)

torch.set_num_threads(1)
before = resident()
DO
use(3)
start = faults()
use(5)
new = faults() - start
kept = resident() - before
return_freed_memory()
print('measured', new, kept, resident() - before)
"""
PAGES = MIB * 2**20 // os.sysconf('SC_PAGE_SIZE')


def measure(do, **variables):
    """Page faults of five tensors of 64 MiB, MiB that stay resident behind them, and those after the return."""
    env = {name: value for name, value in os.environ.items() if name not in (*SETTINGS, 'GLIBC_TUNABLES')}
    env |= {'PYTHONPATH': os.pathsep.join(sys.path), 'CUDA_VISIBLE_DEVICES': '-1', 'THP_MEM_ALLOC_ENABLE': '0'}
    done = subprocess.run(
        [sys.executable, '-W', 'ignore', '-c', PROGRAM.replace('DO', do)],
        env=env | variables,
        capture_output=True,
        text=True,
        check=True,
    )
    return [float(value) for value in done.stdout.split('measured')[1].split()]


def test_tools_keep_memory_on_a_cpu():
    new, kept, returned = measure(
        'from argparse import Namespace; from mmvim import cli; cli.run(lambda args: None, Namespace(device=None))'
    )
    assert new < PAGES / 10
    assert kept >= MIB
    assert returned < kept - 0.9 * MIB


@pytest.mark.parametrize(
    'variables', [{'MALLOC_TRIM_THRESHOLD_': '131072'}, {'GLIBC_TUNABLES': 'glibc.malloc.mmap_threshold=131072'}]
)
def test_settings_in_the_environment_are_obeyed(variables):
    new, kept, _ = measure('assert not keep_freed_memory()', **variables)
    assert new > 4 * PAGES
    assert kept < MIB


def test_other_systems_are_left_alone(monkeypatch):
    monkeypatch.setattr(platform, 'libc_ver', lambda: ('', ''))
    assert keep_freed_memory() is False
