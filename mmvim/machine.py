"""The machine and the process that something runs in: device, versions, memory."""

import ctypes
import platform
import subprocess
import sys
import time
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path

import torch


def clock(device: torch.device) -> float:
    """Seconds of a clock that is read when the device has done the work in its queue."""
    if device.type != 'cpu':
        torch.get_device_module(device).synchronize(device)
    return time.perf_counter()


def device_name(device: torch.device) -> str:
    """What the maker calls a GPU, or the processor of this machine."""
    if device.type == 'cuda':
        return torch.cuda.get_device_name(device)
    if device.type == 'cpu' and Path('/proc/cpuinfo').exists():
        for line in Path('/proc/cpuinfo').read_text().splitlines():
            if line.startswith('model name'):
                return line.split(':', 1)[1].strip()
    return platform.processor() or platform.machine()


def versions() -> dict[str, str]:
    """Versions of what the figures depend on, and the commit if this is a checkout."""
    found = {'torch': torch.__version__, 'python': platform.python_version()}
    for package in ('mmvim', 'numba', 'triton'):
        try:
            found[package] = version(package)
        except PackageNotFoundError:
            continue
    return found | {'commit': _commit(Path(__file__).resolve().parents[1]) or 'unknown'}


def _commit(root: Path) -> str:
    """Commit of a checkout with this root; empty if it is none, also inside of somebody else's."""

    def git(*arguments: str) -> str:
        return subprocess.run(['git', *arguments], cwd=root, capture_output=True, text=True).stdout.strip()

    try:
        top = git('rev-parse', '--show-toplevel')
        return git('describe', '--always', '--dirty') if top and Path(top).resolve() == root.resolve() else ''
    except OSError:  # no git here
        return ''


def forget_peak() -> float:
    """Resident set in MiB, from which the peak starts anew where the system allows it; else the peak until now."""
    try:
        Path('/proc/self/clear_refs').write_text('5')
    except OSError:
        return peak_rss_mib()
    return _status_mib('VmRSS')


def peak_rss_mib() -> float:
    """Largest resident set so far, MiB."""
    if Path('/proc/self/status').exists():
        return _status_mib('VmHWM')
    import resource  # not on Windows

    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / (2**20 if sys.platform == 'darwin' else 2**10)


def _status_mib(name: str) -> float:
    lines = dict(line.split(':', 1) for line in Path('/proc/self/status').read_text().splitlines())
    return int(lines[name].split()[0]) / 1024


def return_freed_memory() -> None:
    """Hand the free memory that glibc has kept until now back to the system; nothing on systems without glibc."""
    if platform.libc_ver()[0] == 'glibc':
        ctypes.CDLL(None).malloc_trim(0)
