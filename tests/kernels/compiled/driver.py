"""Triton's own NVIDIA driver on a machine without a GPU, above a libcuda that only answers (libcuda.c).

After ``install`` a ``kernel[grid](...)`` on CPU tensors takes the whole path of a launch: it binds and specialises its
arguments, compiles with ptxas, loads the cubin, and flattens its arguments in Triton's C launcher. What would then run
on the device is handed to ``on_launch``.
"""

from __future__ import annotations

import ctypes
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from .build import build

HOOK = ctypes.CFUNCTYPE(None, ctypes.c_void_p, ctypes.POINTER(ctypes.c_uint), ctypes.POINTER(ctypes.c_void_p))


@dataclass(frozen=True)
class Launch:
    """What the device is asked to run."""

    name: str
    kernel: Any  # Triton's CompiledKernel
    grid: tuple[int, int, int]
    threads: int
    shared: int  # bytes
    params: ctypes.Array  # addresses of the parameters, as the launcher passes them


def install(capability: int, on_launch: Callable[[Launch], None], folder: Path) -> None:
    """Makes Triton's NVIDIA driver the active one, for a device of this compute capability (90: an H100).

    There is no way back: do this in a process of its own. An exception of ``on_launch`` is raised where the kernel was
    launched.

    Args:
        capability: ten times the compute capability.
        on_launch: called with every launch, instead of the device.
        folder: where the stub of libcuda is built.
    """
    import triton
    from triton.backends.nvidia import driver as nvidia
    from triton.compiler.compiler import CompiledKernel
    from triton.runtime.driver import driver

    path = build('libcuda.c', folder, 'libcuda.so.1', f'-I{Path(nvidia.__file__).parent / "include"}')
    library = ctypes.CDLL(str(path), mode=ctypes.RTLD_GLOBAL)
    library.stub_name.restype, library.stub_name.argtypes = ctypes.c_char_p, [ctypes.c_void_p]
    triton.knobs.nvidia.libcuda_path = str(folder)
    nvidia.libcuda_dirs.cache_clear()
    nvidia.library_dirs.cache_clear()
    kernels: dict[int, CompiledKernel] = {}  # by the handle of the function
    problems: list[BaseException] = []

    def launched(function: int, dims: Any, params: Any) -> None:
        try:
            kernel, name = kernels[function], library.stub_name(function).decode()
            on_launch(Launch(name, kernel, tuple(dims[:3]), dims[3], dims[4], params))
        except BaseException as problem:  # an exception cannot pass through C
            problems.append(problem)

    hook = HOOK(launched)
    library.stub_setup(capability, hook)

    class Driver(nvidia.CudaDriver):
        def __init__(self) -> None:
            self.keep = hook  # C holds its address only
            self.utils = nvidia.CudaUtils()
            self.launcher_cls = nvidia.CudaLauncher
            self.get_device_capability = lambda device=0: divmod(capability, 10)
            self.get_current_stream = lambda device=0: 0
            self.get_current_device = lambda: 0
            self.set_current_device = lambda device: None

    driver.set_active(Driver())
    load, run = CompiledKernel._init_handles, triton.runtime.jit.JITFunction.run

    def load_and_note(self: CompiledKernel) -> None:
        load(self)
        kernels[self.function] = self

    def run_and_raise(self: Any, *args: Any, **kwargs: Any) -> Any:
        result = run(self, *args, **kwargs)
        if problems:
            problem = problems[0]
            problems.clear()
            raise problem
        return result

    CompiledKernel._init_handles = load_and_note
    triton.runtime.jit.JITFunction.run = run_and_raise
