"""Runs a translated kernel on the CPU and says where it does what no kernel may do."""

from __future__ import annotations

import ctypes
import re
from pathlib import Path

from .build import build
from .decode import Decoder, Instruction, Operation, Program
from .ptx import parse

MOST_STEPS = 200_000_000  # instructions of one program: far more than any test needs
MOST_SHARED = 1 << 18


class Range(ctypes.Structure):
    """As in machine.c."""

    _fields_ = (('low', ctypes.c_uint64), ('high', ctypes.c_uint64))


class Run(ctypes.Structure):
    """As in machine.c."""

    _fields_ = (
        ('code', ctypes.POINTER(Instruction)),
        ('length', ctypes.c_uint32),
        ('threads', ctypes.c_uint32),
        ('rows', ctypes.c_void_p),
        ('register_bytes', ctypes.c_uint32),
        ('ctaid', ctypes.c_uint32 * 3),
        ('nctaid', ctypes.c_uint32 * 3),
        ('grid', ctypes.c_uint32 * 3),
        ('shared_bytes', ctypes.c_uint32),
        ('params', ctypes.POINTER(ctypes.c_uint64)),
        ('ranges', ctypes.POINTER(Range)),
        ('n_ranges', ctypes.c_uint32),
        ('check_races', ctypes.c_uint32),
        ('most_steps', ctypes.c_uint64),
        ('problem', ctypes.c_char_p),
        ('address', ctypes.c_uint64),
        ('program', ctypes.c_uint32),
        ('thread', ctypes.c_uint32),
        ('at', ctypes.c_uint32),
    )


class KernelError(RuntimeError):
    """A kernel did what no kernel may do: the message says what, where, and in which program and thread."""


class Machine:
    """machine.c, built.

    Args:
        folder: where to build it.
        noise: whether approximate instructions err as far as their definition allows.
        races: whether accesses to global memory are checked for races.
    """

    def __init__(self, folder: Path, noise: bool = True, races: bool = True) -> None:
        self.library, self.races = ctypes.CDLL(str(build('machine.c', folder, 'machine.so'))), races
        self.library.operation_name.restype = ctypes.c_char_p
        self.library.set_noise(int(noise))
        self.operations: dict[str, Operation] = {}
        while (name := self.library.operation_name(number := len(self.operations))) is not None:
            sizes = tuple(self.library.operation_size(number, k) for k in range(4))
            self.operations[name.decode()] = Operation(number, sizes if sizes[0] else ())

    def translate(self, ptx: str) -> Program:
        """The one kernel of a PTX module, ready to run."""
        return Decoder(parse(ptx), self.operations).program()

    def run(
        self,
        program: Program,
        grid: tuple[int, int, int],
        shared: int,
        params: list[int],
        given: dict[str, tuple[int, int]],
    ) -> None:
        """Runs every program of a launch.

        Args:
            program: the kernel.
            grid: number of programs in x, y and z.
            shared: bytes of shared memory.
            params: values of the parameters, as bits.
            given: memory that the kernel may touch: first and last address by the name of the tensor.

        Raises:
            KernelError: at the first access that is not allowed.
        """
        if shared > MOST_SHARED:
            raise NotImplementedError(f'{program.kernel.name}: {shared} bytes of shared memory; at most {MOST_SHARED}')
        size = program.register_bytes + len(program.constants)
        rows = (ctypes.c_uint64 * (size // 8 + 1))()
        ctypes.memmove(ctypes.addressof(rows) + program.register_bytes, program.constants, len(program.constants))
        ranges = (Range * (len(given) + 1))(*given.values())
        run = Run(
            code=program.code,
            length=len(program.code),
            threads=program.kernel.threads,
            rows=ctypes.addressof(rows),
            register_bytes=program.register_bytes,
            grid=(ctypes.c_uint32 * 3)(*grid),
            shared_bytes=shared,
            params=(ctypes.c_uint64 * (len(params) + 1))(*params),
            ranges=ranges,
            n_ranges=len(given),
            check_races=int(self.races),
            most_steps=MOST_STEPS,
        )
        for field in ('ctaid', 'nctaid'):
            getattr(run, field)[:] = [program.specials.get(f'%{field}.{axis}', 0) for axis in 'xyz']
        self.library.run(ctypes.byref(run))
        if run.problem is not None:
            raise KernelError(describe(run, program, given))


def describe(run: Run, program: Program, given: dict[str, tuple[int, int]]) -> str:
    """One line on what went wrong and where."""
    statement = program.statements[run.at]
    where = ''
    if given and re.search(r'\b(ld|st)\.global', statement.text):
        name, (low, high) = min(given.items(), key=lambda item: max(item[1][0] - run.address, run.address - item[1][1]))
        where = f', at byte {run.address - low} of {name} ({high - low} bytes)'
    return (
        f'{program.kernel.name}: {run.problem.decode()}{where}; program {run.program}, thread {run.thread}, '
        f'{statement.source}, PTX line {statement.line} `{statement.text}`'
    )
