"""Builds this folder's C files with the system's compiler."""

from __future__ import annotations

import os
import shutil
import subprocess
from pathlib import Path

HERE = Path(__file__).parent
FLAGS = (
    *('-shared', '-fPIC', '-O2', '-march=native', '-w', '-fwrapv', '-fno-strict-aliasing'),
    *('-ffp-contract=off', '-fno-math-errno', '-fno-trapping-math'),
)


def why_not() -> str | None:
    """Why compiled kernels cannot be run on this machine, or None."""
    try:
        from triton.backends.nvidia import driver
    except ImportError as error:
        return f'Triton has no NVIDIA backend here: {error}'
    folder = Path(driver.__file__).parent
    if not (folder / 'bin' / 'ptxas').exists():
        return f'this build of Triton has no ptxas in {folder / "bin"}'
    if not (folder / 'include' / 'cuda.h').exists():
        return f'this build of Triton has no cuda.h in {folder / "include"}'
    if compiler() is None:
        return 'no C compiler: none of $CC, cc, gcc and clang is a program'
    return None


def compiler() -> str | None:
    """The C compiler: $CC, or the first that is installed."""
    return next(filter(None, map(shutil.which, filter(None, (os.environ.get('CC'), 'cc', 'gcc', 'clang')))), None)


def build(source: str, folder: Path, name: str, *options: str) -> Path:
    """Builds one file as a shared library in a folder, if it is not there yet, and returns its path."""
    target = folder / name
    if target.exists():
        return target
    fresh = folder / f'{name}.{os.getpid()}'
    command = [compiler(), *FLAGS, *options, f'-Wl,-soname,{name}', str(HERE / source), '-o', str(fresh), '-lm']
    result = subprocess.run(command, capture_output=True, text=True)
    if result.returncode:
        raise RuntimeError(f'{source}: {" ".join(command)} failed:\n{result.stderr[:2000]}')
    return fresh.rename(target)
