"""What the C library does with memory that tensors no longer need."""

import ctypes
import os
import platform

M_TRIM_THRESHOLD, M_MMAP_MAX = -1, -4  # the numbers of malloc.h
LARGEST = 2**31 - 1
SETTINGS = ('MALLOC_TRIM_THRESHOLD_', 'MALLOC_MMAP_THRESHOLD_', 'MALLOC_MMAP_MAX_', 'MALLOC_TOP_PAD_')


def keep_freed_memory() -> bool:
    """Let glibc keep the memory of freed tensors for the next ones; the tools do so when they run on a CPU.

    By default glibc hands every block above 32 MiB back to the system as soon as it is free, so that each new tensor of
    that size faults in all of its pages. From now on the process gives nothing back before it ends, whatever freed it.
    Settings of glibc's allocator in the environment are obeyed, and another allocator that was loaded in its place
    notices nothing.

    Returns:
        Whether glibc agreed; False where the environment has settings of its own, and on systems without glibc.
    """
    chosen = any(name in os.environ for name in SETTINGS) or 'glibc.malloc' in os.environ.get('GLIBC_TUNABLES', '')
    if chosen or platform.libc_ver()[0] != 'glibc':
        return False
    libc = ctypes.CDLL(None)
    return bool(libc.mallopt(M_MMAP_MAX, 0) and libc.mallopt(M_TRIM_THRESHOLD, LARGEST))


def return_freed_memory() -> None:
    """Hand the free memory that glibc has kept until now back to the system; nothing on systems without glibc."""
    if platform.libc_ver()[0] == 'glibc':
        ctypes.CDLL(None).malloc_trim(0)
