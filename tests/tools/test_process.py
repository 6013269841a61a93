"""What the tools set before anything else, and what that does to the memory of the process."""

import os
import platform
import subprocess
import sys
from pathlib import Path

import pytest

TOOLS = Path(__file__).parents[2] / 'tools'
MIB = 64
PROGRAM = f"""
import resource, sys
sys.path.insert(0, {str(TOOLS)!r})
from _process import prepare
prepare()
import mmvim.tools.command_line
from mmvim.machine import forget_peak, peak_rss_mib, return_freed_memory
import torch

torch.set_num_threads(1)
torch.ones({MIB}, 2**18)
start = resource.getrusage(resource.RUSAGE_SELF).ru_minflt
for _ in range(5):
    torch.ones({MIB}, 2**18)
print('faults', resource.getrusage(resource.RUSAGE_SELF).ru_minflt - start)
pieces = [torch.ones(2**18) for _ in range(200)]
last = torch.ones(2**18)
full = forget_peak()
del pieces
return_freed_memory()
print('returned', full - forget_peak())
"""


def run(program, *arguments, **variables):
    env = {name: value for name, value in os.environ.items() if name != 'THP_MEM_ALLOC_ENABLE'}
    env |= {'PYTHONPATH': os.pathsep.join(sys.path), 'MALLOC_MMAP_THRESHOLD_': str(2**25)} | variables
    done = subprocess.run(
        [sys.executable, '-W', 'ignore', '-c', program, *arguments], env=env, capture_output=True, text=True, check=True
    )
    return {line.split()[0]: line.split()[-1] for line in done.stdout.splitlines() if line}


@pytest.mark.skipif(platform.libc_ver()[0] != 'glibc', reason='memory of glibc')
def test_memory_of_a_tool():
    huge = Path('/sys/kernel/mm/transparent_hugepage/enabled')
    on = huge.exists() and '[never]' not in huge.read_text()
    pages = 5 * MIB * 2**20 // os.sysconf('SC_PAGE_SIZE')
    found = run(PROGRAM)
    assert not on or float(found['faults']) < pages / 4
    assert float(found['returned']) > 190


@pytest.mark.parametrize('tool', sorted(path.name for path in TOOLS.glob('[a-z]*.py')))
def test_every_tool_prepares_its_process(tool):
    program = f"""
import os, sys
sys.path.insert(0, {str(TOOLS)!r})
import {tool.removesuffix('.py')} as tool
sys.modules['mmvim'] = None  # what follows is not needed
try:
    tool.main()
except ImportError:
    print('pages', os.environ['THP_MEM_ALLOC_ENABLE'])
    print('gpus', os.environ['CUDA_VISIBLE_DEVICES'])
"""
    assert run(program, '--device', 'cpu', CUDA_VISIBLE_DEVICES='0') == dict(pages='1', gpus='-1')
    assert run(program, CUDA_VISIBLE_DEVICES='0', THP_MEM_ALLOC_ENABLE='0') == dict(pages='0', gpus='0')
