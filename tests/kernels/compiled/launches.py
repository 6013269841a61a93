"""Makes launches of Triton kernels on CPU tensors run the compiled PTX."""

from __future__ import annotations

import ctypes
import functools
from collections import Counter
from pathlib import Path
from typing import Any

import torch

from . import driver
from .decode import Program
from .machine import Machine

counted: Counter[str] = Counter()  # launches by the name of the kernel
programs: dict[int, tuple[Any, Program]] = {}  # by the id of Triton's kernel, which stays here so that no other gets it


def memory_of(args: Any, names: Any, found: dict[str, tuple[int, int]]) -> dict[str, tuple[int, int]]:
    """First and last address of the memory of every tensor in args, nested tuples included, by the argument's name."""
    for name, x in zip(names, args, strict=False):
        if isinstance(x, torch.Tensor):
            storage = x.untyped_storage()
            found[name] = storage.data_ptr(), storage.data_ptr() + storage.nbytes()
        elif isinstance(x, (tuple, list)):
            memory_of(x, (f'{name}[{i}]' for i in range(len(x))), found)
    return found


def install(capability: int, folder: Path, noise: bool = True, races: bool = True) -> None:
    """Runs every kernel of this process through its PTX for a compute capability, from now on."""
    import triton

    machine = Machine(folder, noise, races)
    given: dict[str, tuple[int, int]] = {}

    def on_launch(launch: driver.Launch) -> None:
        if id(launch.kernel) not in programs:
            programs[id(launch.kernel)] = launch.kernel, machine.translate(launch.kernel.asm['ptx'])
        program = programs[id(launch.kernel)][1]
        if program.kernel.threads != launch.threads:
            raise RuntimeError(f'{launch.name} is launched with {launch.threads} threads, not {program.kernel.threads}')
        params = [
            int.from_bytes(ctypes.string_at(launch.params[i], size), 'little')
            for i, size in enumerate(program.kernel.params)
        ]
        counted[launch.name] += 1
        machine.run(program, launch.grid, launch.shared, params, given)

    driver.install(capability, on_launch, folder)
    run = triton.runtime.jit.JITFunction.run

    @functools.wraps(run)
    def run_with_memory(self: Any, *args: Any, **kwargs: Any) -> Any:
        given.clear()
        memory_of(args, self.arg_names, given)
        memory_of(kwargs.values(), kwargs, given)
        return run(self, *args, **kwargs)

    triton.runtime.jit.JITFunction.run = run_with_memory
