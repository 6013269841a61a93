"""Every Triton kernel compiled for GPUs that are not here: registers, spills, and what the inner loops are made of.

The host functions run on CPU tensors with a driver that only names its target, and launches stop after compiling, so
arguments are specialised as on a device. Register tables are printed (pytest -s, or the report of a failure).
"""

# K directions, B batch, L tokens, D channels, N state size, W width

import os
import re
import subprocess
import warnings
from dataclasses import dataclass
from pathlib import Path

import pytest
import torch

triton = pytest.importorskip('triton')
from triton.backends.compiler import GPUTarget  # noqa: E402
from triton.runtime.driver import driver  # noqa: E402

from ssm_kernels.ops.add_rms_norm import gpu as norm_gpu  # noqa: E402
from ssm_kernels.ops.causal_conv1d import gpu as conv_gpu  # noqa: E402
from ssm_kernels.ops.selective_scan import gpu  # noqa: E402

pytestmark = pytest.mark.skipif(
    os.environ.get('TRITON_INTERPRET') == '1', reason='interpreted kernels cannot be compiled in the same process'
)
TRITON = tuple(int(part) for part in triton.__version__.split('.')[:2])
TOOLS = Path(triton.__file__).parent / 'backends' / 'nvidia' / 'bin'
TARGETS = {
    'sm_80': GPUTarget('cuda', 80, 32),
    'sm_90': GPUTarget('cuda', 90, 32),
    'sm_100': GPUTarget('cuda', 100, 32),
    'gfx942': GPUTarget('hip', 'gfx942', 64),
}


# (version, target, kernel) -> registers and spills that this version is known to need where others hold the bound
KNOWN = {((3, 6), 'gfx942', 'scan_backward_kernel'): (266, 0)}
# a new version that misses its bound by no more than this gets a warning: look, and enter it above
A_FEW_REGISTERS, A_FEW_SPILLS = 16, 64


class NamesItsTarget:
    def __init__(self, target):
        self.target = target

    def get_current_target(self):
        return self.target

    def get_current_device(self):
        return 0

    def get_current_stream(self, device):
        return 0


@dataclass(frozen=True)
class Loop:
    """Instructions of an innermost loop, by what they start with."""

    lines: tuple[str, ...]

    def count(self, *names: str) -> int:
        return sum(line.startswith(names) for line in self.lines)


@dataclass(frozen=True)
class Compiled:
    kernel: str
    registers: int
    spilled: int  # bytes of stack, or spilled vector registers on AMD
    loops: tuple[Loop, ...]


def hold(found: Compiled, target: str, registers: int) -> None:
    """Fails if a kernel misses its bound on registers, or spills, by much more than is known; warns if by a little."""
    registers, spills = KNOWN.get((TRITON, target, found.kernel), (registers, 0))
    for what, needed, bound, slack in (
        ('registers', found.registers, registers, A_FEW_REGISTERS),
        ('spills', found.spilled, spills, A_FEW_SPILLS),
    ):
        line = f'{found.kernel} for {target}, Triton {triton.__version__}: {needed} {what}, the bound is {bound}'
        assert needed <= bound + slack, line
        if needed > bound:
            warnings.warn(line, stacklevel=2)


def test_a_bound_missed_by_a_little_warns_and_by_much_fails():
    hold(Compiled('kernel', 128, 0, ()), 'sm_90', 128)
    for registers, spills in ((128 + A_FEW_REGISTERS, 0), (128, A_FEW_SPILLS)):
        with pytest.warns(UserWarning, match=r'^kernel for sm_90, Triton \S+: \d+ (registers|spills), the bound is'):
            hold(Compiled('kernel', registers, spills, ()), 'sm_90', 128)
    for registers, spills in ((129 + A_FEW_REGISTERS, 0), (128, 1 + A_FEW_SPILLS)):
        with pytest.raises(AssertionError, match='the bound is'):
            hold(Compiled('kernel', registers, spills, ()), 'sm_90', 128)


def read_cubin(kernel: str, cubin: bytes, folder: Path) -> Compiled:
    path = folder / 'kernel.cubin'
    path.write_bytes(cubin)

    def tool(*command: str) -> str:
        return subprocess.run(
            [TOOLS / command[0], *command[1:], path], capture_output=True, text=True, check=True
        ).stdout

    use = tool('cuobjdump', '-res-usage')
    registers, stack, local = (int(re.search(rf'{name}:(\d+)', use)[1]) for name in ('REG', 'STACK', 'LOCAL'))
    lines, labels, jumps = [], {}, []
    for line in tool('nvdisasm', '-c').splitlines():
        if label := re.match(r'\s*(\.L_x_\d+):', line):
            labels[label[1]] = len(lines)
        elif code := re.search(r'/\*[0-9a-f]{4,}\*/\s+(?:@!?U?P\d+ )?\s*(.*?)\s*;', line):
            if target := re.match(r'BRA.*?`\((\.L_x_\d+)\)', code[1]):
                jumps.append((target[1], len(lines)))
            lines.append(code[1])
    spans = [(labels[name], end) for name, end in jumps if labels.get(name, end) < end]
    inner = [a for a in spans if not any(b != a and b[0] >= a[0] and b[1] <= a[1] for b in spans)]
    spilled = stack + local + sum(line.startswith(('STL', 'LDL')) for line in lines)
    return Compiled(kernel, registers, spilled, tuple(Loop(tuple(lines[a : b + 1])) for a, b in inner))


def read_amdgcn(kernel: str, text: str) -> Compiled:
    keys = ('vgpr_count', 'vgpr_spill_count', 'private_segment_fixed_size')
    registers, spilled, private = (int(re.search(rf'\.{key}:\s*(\d+)', text)[1]) for key in keys)
    return Compiled(kernel, registers, spilled + private, ())


@pytest.fixture
def compile_launches(monkeypatch, tmp_path):
    """Runs a host function for a target and returns what its launches would run, in order."""
    monkeypatch.setenv('TRITON_CACHE_DIR', str(tmp_path / 'cache'))

    def compile_launches(target: str, host, *args) -> list[Compiled]:
        monkeypatch.setattr(driver, '_active', NamesItsTarget(TARGETS[target]))
        for module in (gpu, conv_gpu):
            monkeypatch.setattr(module, 'fast_math', lambda x: target.startswith('sm'))
        monkeypatch.setattr(torch.version, 'hip', None if target.startswith('sm') else 'named by a test')
        found, real = [], triton.runtime.jit.JITFunction.run

        def stop_after_compiling(self, *args, grid, warmup, **kwargs):
            self.device_caches.clear()
            kernel = real(self, *args, grid=grid, warmup=True, **kwargs)
            self.device_caches.clear()
            name = self.fn.__name__
            if 'cubin' in kernel.asm:
                found.append(read_cubin(name, kernel.asm['cubin'], tmp_path))
            else:
                found.append(read_amdgcn(name, kernel.asm['amdgcn']))
            print(f'{target} {name}: {found[-1].registers} registers, {found[-1].spilled} spilled')
            for loop in found[-1].loops:
                counts = {n: loop.count(n) for n in ('MUFU', 'LDG', 'STG', 'SHFL', 'BAR', 'LDS', 'STS')}
                print(f'    loop of {len(loop.lines)} instructions:', *(f'{c} {n}' for n, c in counts.items()))
            return kernel

        with monkeypatch.context() as patch:
            patch.setattr(triton.runtime.jit.JITFunction, 'run', stop_after_compiling)
            host(*args)
        return found

    return compile_launches


def inputs(K, N, dtype=torch.bfloat16, L=128, D=384, batch=1, constant=False):
    """Tensors as the Vim block has them: B and C are slices of a projection, z is one half of another."""
    row = torch.zeros(K, batch, L, 12 + 2 * N, dtype=dtype)
    B, C = (x.unsqueeze(3) for x in row[..., 12:].split(N, -1))
    if constant:
        B, C = torch.zeros(2, K, D, N)
    u, dt = torch.zeros(2, K, batch, L, D, dtype=dtype)
    z = torch.zeros(batch, L, 2 * D, dtype=dtype)[..., D:]
    return u, dt, torch.zeros(K, D, N), B, C, torch.zeros(K, D), z, torch.zeros(K, D)


def forward(x, save=True):
    gpu._forward(*x, True, False, 1.0, save)


def backward(x):
    K, batch, L, D = x[0].shape
    states = torch.zeros(K, batch, -(-L // gpu.BLOCK), *x[2].shape[1:])
    gpu._backward(torch.zeros_like(x[0][0]), None, *x, states, True, False, 1.0)


# (target, K, N, dtype); rows that compile for more than a few seconds are slow
FORWARD = [
    ('sm_90', 2, 16, torch.bfloat16),
    ('gfx942', 1, 8, torch.bfloat16),
    *(
        pytest.param(*row, marks=pytest.mark.slow)
        for row in [
            ('sm_80', 1, 8, torch.bfloat16),
            ('sm_100', 1, 8, torch.float16),
            *((target, 2, n, torch.bfloat16) for target in ('sm_80', 'sm_100', 'gfx942') for n in (8, 16)),
            ('sm_90', 2, 8, torch.float16),
            ('sm_90', 2, 16, torch.float32),
            ('sm_80', 2, 16, torch.float32),
            ('sm_90', 1, 5, torch.bfloat16),
            ('sm_90', 1, 32, torch.bfloat16),
            ('sm_90', 1, 64, torch.bfloat16),
            ('sm_80', 1, 64, torch.float32),
        ]
    ),
]


@pytest.mark.parametrize(('target', 'K', 'N', 'dtype'), FORWARD, ids=str)
def test_forward_in_chunks(target, K, N, dtype, compile_launches):
    found = compile_launches(target, forward, inputs(K, N, dtype))
    assert [c.kernel for c in found] == ['chunk_state_kernel', 'pass_state_kernel', 'scan_forward_kernel']
    check_forward(found, target, K, N, most=128 if N <= 16 else 255)


@pytest.mark.slow
@pytest.mark.parametrize('N', [8, 16])
@pytest.mark.parametrize('target', ['sm_80', 'sm_90', 'sm_100'])
def test_forward_in_one_pass_with_two_channels_to_a_lane(target, N, compile_launches):
    found = compile_launches(target, forward, inputs(2, N, L=8, batch=200), False)
    assert [c.kernel for c in found] == ['scan_forward_kernel']
    check_forward(found, target, 2, N, most=168, lanes=2)


def check_forward(found, target, K, N, most, lanes=1):
    for c in found:
        hold(c, target, most if target.startswith('sm') else 256)  # 256: two wavefronts on a SIMD of AMD's
    if not target.startswith('sm'):
        return
    for c in found:
        loops = [loop for loop in c.loops if loop.count('MUFU')]
        assert loops, c.kernel
        for loop in loops:
            assert loop.count('SHFL', 'BAR', 'LDS', 'STS', 'WARPSYNC') == 0, c.kernel
        if c.kernel == 'scan_forward_kernel':
            # exp2 of N decays and of softplus; the last direction also has the gate's, with a reciprocal
            unroll = 1 if N > 16 else 2 if lanes == 2 else 4
            steps = sorted({unroll, 1}) * K
            gated = [1] * (len(steps) // K) + [0] * (len(steps) - len(steps) // K)
            allowed = sorted(s * lanes * (N + 1 + 2 * g) for s, g in zip(steps, gated, strict=True))
            assert sorted(loop.count('MUFU') for loop in loops) == allowed


BACKWARD = [
    ('sm_90', 2, 16, torch.bfloat16, False),
    ('sm_90', 1, 8, torch.bfloat16, False),
    ('gfx942', 2, 16, torch.bfloat16, False),
    *(
        pytest.param(*row, marks=pytest.mark.slow)
        for row in [
            ('sm_80', 2, 16, torch.bfloat16, False),
            ('sm_100', 2, 16, torch.bfloat16, False),
            *((target, 2, 8, torch.bfloat16, False) for target in TARGETS),
            *((target, 2, 16, torch.float32, False) for target in TARGETS),
            *((target, 1, n, torch.bfloat16, False) for target in ('sm_80', 'sm_90') for n in (5, 32, 64)),
            *((target, 1, n, torch.float32, True) for target in TARGETS for n in (16, 64)),
        ]
    ),
]


@pytest.mark.parametrize(('target', 'K', 'N', 'dtype', 'constant'), BACKWARD, ids=str)
def test_backward(target, K, N, dtype, constant, compile_launches):
    (found,) = compile_launches(target, backward, inputs(K, N, dtype, L=64, constant=constant))
    assert found.kernel == 'scan_backward_kernel'
    hold(found, target, 255 if target.startswith('sm') else 256)  # 256: two wavefronts on a SIMD of AMD's


@pytest.mark.slow
@pytest.mark.parametrize('target', list(TARGETS))
def test_backward_in_chunks(target, compile_launches):
    found = compile_launches(target, backward, inputs(2, 16))
    assert [c.kernel for c in found] == ['chunk_state_kernel', 'pass_state_kernel', 'scan_backward_kernel']
    for c in found:
        hold(c, target, 255 if target.startswith('sm') else 256)


# ---- the short convolutions


def conv_inputs(padding, W, dtype, D=384, L=64):
    """x is one half of a projection, as in the Vim block."""
    K = 2 if padding == 'both' else 1
    x = torch.zeros(1, L, 2 * D, dtype=dtype)[..., :D]
    return x, torch.zeros(K, D, W), torch.zeros(K, D), padding, True


def conv_backward(x, weight, *rest):
    conv_gpu._backward(torch.zeros(weight.shape[0], *x.shape, dtype=x.dtype), x, weight, *rest)


CONV = [
    *((target, 'both', 4, torch.bfloat16, 384) for target in ('sm_90', 'gfx942')),
    ('sm_90', 'same', 3, torch.bfloat16, 160),
    *(
        pytest.param(*row, marks=pytest.mark.slow)
        for row in [
            *((target, 'both', 4, torch.bfloat16, 384) for target in ('sm_80', 'sm_100')),
            *((target, 'both', 4, dtype, 384) for target in TARGETS for dtype in (torch.float32, torch.float16)),
            *((target, padding, 4, torch.bfloat16, 384) for target in TARGETS for padding in ('causal', 'anticausal')),
            *((target, 'same', w, torch.float32, 160) for target in TARGETS for w in (2, 3)),
            *((target, 'both', w, torch.bfloat16, 33) for target in TARGETS for w in (2, 3)),
        ]
    ),
]


@pytest.mark.parametrize(('target', 'padding', 'W', 'dtype', 'D'), CONV, ids=str)
def test_convolution(target, padding, W, dtype, D, compile_launches):
    x = conv_inputs(padding, W, dtype, D)
    (forward,) = compile_launches(target, conv_gpu._forward, *x)
    (backward,) = compile_launches(target, conv_backward, *x)
    assert (forward.kernel, backward.kernel) == ('conv_forward_kernel', 'conv_backward_kernel')
    # 32 and 16 warps on a multiprocessor of NVIDIA's, 8 and 4 wavefronts on a SIMD of AMD's
    hold(forward, target, 64)
    hold(backward, target, 128)
    if target.startswith('sm') and D != 33:  # rows of 33 cannot be read two values at a time
        K, U, lanes = x[1].shape[0], conv_gpu.UNROLL, 1 if D == 160 else 2
        (ahead,), (back,) = forward.loops, backward.loops
        assert ahead.count('LDG') == U  # every row once, for all taps and both directions
        assert back.count('LDG') == U * (K + 1) and back.count('STG') == U
        for loop in (ahead, back):
            assert loop.count('MUFU') == U * K * lanes * 2
            assert loop.count('SHFL', 'BAR', 'LDS', 'STS') == 0


# ---- residual addition and RMSNorm


def norm_forward(D, x_dtype, added, T=4096):
    x = torch.zeros(T, D, dtype=x_dtype)
    norm_gpu._forward(x, torch.zeros(T, D) if added else None, torch.zeros(D), 1e-5, x_dtype)


def norm_backward(D, x_dtype, added, T=4096):
    dout, stream = torch.zeros(T, D, dtype=x_dtype), torch.zeros(T, D)
    norm_gpu._backward(dout, stream if added else None, stream, stream[:, 0], torch.zeros(D), x_dtype, added)


NORM = [
    *((target, 192, torch.bfloat16, True) for target in TARGETS),
    ('sm_90', 768, torch.bfloat16, False),
    *(
        pytest.param(*row, marks=pytest.mark.slow)
        for row in [
            *((target, D, torch.bfloat16, True) for target in TARGETS for D in (384, 1280, 8192)),
            *((target, D, torch.float32, added) for target in TARGETS for D, added in ((192, True), (8192, False))),
            *((target, 33, torch.float16, True) for target in TARGETS),
        ]
    ),
]


@pytest.mark.parametrize(('target', 'D', 'dtype', 'added'), NORM, ids=str)
def test_norm(target, D, dtype, added, compile_launches):
    found = compile_launches(target, norm_forward, D, dtype, added)
    found += compile_launches(target, norm_backward, D, dtype, added)
    assert [c.kernel for c in found] == ['norm_forward_kernel', 'norm_backward_kernel']
    for c in found:
        # 128: all that 16 warps can have; rows of 33 are read value by value
        hold(c, target, 64 if D <= 1024 and D != 33 else 128)
