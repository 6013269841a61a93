"""Runs Triton kernels on a machine without a GPU, through the PTX that Triton compiled for one.

``launches.install`` gives Triton its own NVIDIA driver above a libcuda that only answers (``driver``, ``libcuda.c``).
A launch takes its whole path: specialisation, compilation, ptxas, loading, the C launcher. What the device would
get is parsed (``ptx``), translated (``decode``) and run by ``machine.c``, all threads of a program in lockstep.

Checked at every access:

- bounds: global memory must belong to a tensor of the launch, shared memory to what the kernel asked for;
- alignment, for the full width of a vector;
- races between programs: two programs may touch the same two bytes only if both read;
- barriers: two threads of a program may touch the same byte of shared memory, or the same two of global memory, only if
  both read, or if a barrier lies between; for threads of one warp a barrier of the warp is enough. By one instruction
  two threads may write the same value, and lanes of one warp any value to shared memory;
- branches: all threads of a program go the same way;
- registers and shared memory start as NaN in every program, and a program must end.

Approximate instructions (ex2, rcp, rsqrt, approximate division) are off by up to what their definition allows.

Not translated, hence refused with kernel and line: atomics, asynchronous copies, matrix multiplication, barriers and
shuffles of some of the threads, global accesses of one byte, and every instruction that operations.h does not name.

Not seen: what ptxas makes of the PTX, the hardware's own rounding of approximate instructions, weak ordering of memory
other than a missing barrier, an access that strays from one tensor of the launch into another one, and speed.
"""
