"""Times scan, convolution, norm, blocks and backbones on a GPU: sides in one process, in turn, medians, one JSON file.

    python kernels/benchmarks/bench_gpu.py --minutes 5

Ops and blocks run once as they are called ("eager") and once from a CUDA graph ("graph"), which leaves the time of the
device alone; caches are overwritten before every call. Times are medians in microseconds. Peers that are missing, or
fail, are named in the file and left out. Nothing is timed unless the outputs and gradients of all three ops agree with
the float64 reference on this device.

Floors: an op's is the least memory traffic at the bandwidth that a copy reaches here; a Vim-Ti block's, on an H100 and
in bfloat16 only, is a model of an unfused block (memory traffic, special functions, instruction issue).
"""

from __future__ import annotations

import argparse
import gc
import json
import platform
import re
import statistics
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import Tensor

HERE = Path(__file__).resolve().parent
sys.path[:0] = [str(HERE.parent), str(HERE)]

import cases  # noqa: E402
import cases_add_rms_norm  # noqa: E402
import cases_causal_conv1d  # noqa: E402
import models  # noqa: E402

from ssm_kernels import add_rms_norm, bidirectional_causal_conv1d, bidirectional_selective_scan  # noqa: E402

PIXELS = (224, 512, 640, 738, 1024, 1248)
BATCHES = (1, 8)
WIDTH, INNER, STATE = 192, 384, 16  # Vim-Ti
EAGER_LOOP_TOKENS = 200  # a loop over time launches about ten kernels a token
SECONDS_PER_ROW = 0.5
LARGEST_BATCH = 1024
# microseconds, modelled, (batch, tokens): an unfused Vim-Ti block in bfloat16 on an H100
H100_BLOCK_FLOOR = {(1, 1024): 12.0, (1, 4096): 49.0, (8, 4096): 392.0, (1, 6084): 73.0, (8, 6084): 582.0}

Sides = dict[str, Callable[[], object]]


class Bench:
    """The device, its clock, what was measured and what was not."""

    def __init__(self, device: str, minutes: float, repeats: int, dry: bool) -> None:
        self.device, self.repeats, self.dry = torch.device(device), repeats, dry
        self.end = time.monotonic() + 60 * minutes
        self.rows: list[dict] = []
        self.left_out: list[str] = []
        self.api = None if dry else torch.get_device_module(self.device)
        # larger than any second-level cache
        self.flush = None if dry else torch.empty(2**28, dtype=torch.int8, device=self.device)

    def out_of_time(self, what: str) -> bool:
        if time.monotonic() < self.end:
            return False
        self.left_out.append(f'{what}: out of time')
        return True

    def microseconds(self, call: Callable) -> float:
        """Time of one call; caches are cold."""
        if self.dry:
            call()
            return float('nan')
        self.flush.zero_()
        start, end = (self.api.Event(enable_timing=True) for _ in range(2))
        start.record()
        call()
        end.record()
        end.synchronize()
        return 1e3 * start.elapsed_time(end)

    def medians(self, title: str, sides: Sides) -> dict[str, float]:
        """Medians of the sides, which take turns, after two calls each to warm up; a side that fails drops out."""
        times: dict[str, list[float]] = {name: [] for name in sides}
        began = time.monotonic()
        for turn in range(1 if self.dry else self.repeats + 2):
            for name in list(times):
                try:
                    value = self.microseconds(sides[name])
                except Exception as problem:  # a peer's kernel may refuse, or memory may not suffice
                    self.leave_out(f'{title}, {name}', problem)
                    del times[name]
                    continue
                if turn > 1 or self.dry:
                    times[name].append(value)
            if turn > 3 and time.monotonic() - began > SECONDS_PER_ROW:
                break
        return {name: statistics.median(values) for name, values in times.items()}

    def leave_out(self, what: str, problem: Exception) -> None:
        text = (str(problem).splitlines() or [''])[0][:200]
        self.left_out.append(f'{what}: {type(problem).__name__}: {text}')

    def graphed(self, title: str, sides: Sides) -> Sides:
        """The same calls, each from a CUDA graph; those that cannot be captured are left out."""
        if self.device.type != 'cuda':
            return {}
        captured = {}
        for name, call in sides.items():
            try:
                side = torch.cuda.Stream()
                side.wait_stream(torch.cuda.current_stream())
                with torch.cuda.stream(side):
                    call()
                torch.cuda.current_stream().wait_stream(side)
                graph = torch.cuda.CUDAGraph()
                with torch.cuda.graph(graph):
                    call()
                captured[name] = graph.replay
            except Exception as problem:
                self.leave_out(f'{title}, {name}, graph', problem)
                torch.cuda.synchronize()
        return captured

    def row(
        self,
        what: str,
        sides: Sides,
        nbytes: int | None = None,
        floor: float | None = None,
        graphs: bool = True,
        **facts,
    ) -> None:
        """Times a row, prints and keeps it. ``nbytes`` is the least memory traffic, ``floor`` is in microseconds."""
        title = ' '.join([what, *(f'{key} {value}' for key, value in facts.items())])
        if self.out_of_time(title):
            return
        row = {'what': what} | facts | {'eager': self.medians(title, sides)}
        if graphs:
            row['graph'] = self.medians(title, self.graphed(title, sides))
        if self.dry:
            print(title, *row['eager'])
            self.rows.append(row)
            return
        best = row.get('graph', {}).get('ours') or row['eager'].get('ours')
        if nbytes and best:
            row['GB/s'] = nbytes / best / 1e3
            floor = nbytes / self.bandwidth / 1e3
        if floor and best:
            row |= {'floor': floor, 'share_of_floor': floor / best}
        self.rows.append(row)
        self.print_row(title, row)

    @staticmethod
    def print_row(title: str, row: dict) -> None:
        for way in ('eager', 'graph'):
            if row.get(way):
                text = [f'{name} {value:.1f} us' for name, value in row[way].items()]
                print(f'{title}, {way}: ' + ', '.join(text), flush=True)
        if 'GB/s' in row:
            print(f'    {row["GB/s"]:.0f} GB/s')
        if 'floor' in row:
            print(f'    {100 * row["share_of_floor"]:.0f} % of the floor of {row["floor"]:.1f} us')

    def measure_bandwidth(self) -> None:
        source = torch.empty(2**30, dtype=torch.int8, device=self.device)
        target = torch.empty_like(source)
        took = statistics.median(self.microseconds(lambda: target.copy_(source)) for _ in range(10))
        self.bandwidth = 2 * source.numel() / took / 1e3  # GB/s


def machine(device: torch.device) -> dict:
    root = HERE.parents[1]
    git = subprocess.run(['git', 'describe', '--always', '--dirty'], cwd=root, capture_output=True, text=True)
    about = {'commit': git.stdout.strip() or 'unknown', 'python': platform.python_version(), 'torch': torch.__version__}
    if device.type == 'cpu':
        return about
    import triton

    properties = torch.get_device_module(device).get_device_properties(device)
    about |= {'device': properties.name, 'memory_GiB': round(properties.total_memory / 2**30, 1)}
    return about | {'triton': triton.__version__, 'cuda': torch.version.cuda, 'hip': torch.version.hip}


def check_numerics(bench: Bench, backend: str | None) -> None:
    """Outputs and gradients of what is about to be timed; raises SystemExit with the list of what is off."""
    found = []
    for module, case in (
        (cases, cases.Case('scan', L=300, D=72, N=16, batch=1, both=True)),
        (cases_causal_conv1d, cases_causal_conv1d.Case('convolution', L=300, D=72, batch=1)),
        (cases_add_rms_norm, cases_add_rms_norm.Case('norm', tokens=(1, 300), D=192)),
    ):
        for dtype in (torch.float32, torch.bfloat16):
            found += [f'{case} {dtype} {text}' for text in problems_on(bench.device, module, case, backend, dtype)]
    if found:
        raise SystemExit('no times, because the numerics are off: ' + '; '.join(found))


def problems_on(device: torch.device, module, case, backend: str | None, dtype: torch.dtype) -> list[str]:
    """``module.problems`` with the backend on the device and the reference on the CPU."""
    inputs = module.make_inputs(case)
    exact, plain = (module.run(case, inputs, kind, 'torch') for kind in (torch.float64, dtype))
    moved = {name: None if x is None else x.to(device) for name, x in inputs.items()}
    ours = {name: x.cpu() for name, x in module.run(case, moved, dtype, backend).items()}
    return module.deviations(ours, plain, exact)


def trained(call: Callable, leaves: list[Tensor]) -> Callable[[], object]:
    """The backward pass of a call alone, on a graph that is kept."""
    ys = call(*leaves)
    ys = [y for y in (ys if isinstance(ys, tuple) else (ys,)) if y.requires_grad]
    seeds = [torch.ones_like(y) for y in ys]
    return lambda: torch.autograd.grad(ys, leaves, seeds, retain_graph=True)


def two_ways(
    bench: Bench, what: str, calls: dict[str, Callable], inputs: list[Tensor], nbytes: tuple[int, int], **facts
) -> None:
    """Rows of the forward and the backward pass of an op."""
    with torch.no_grad():
        ahead = {name: (lambda call=call: call(*inputs)) for name, call in calls.items()}
        bench.row(f'{what} forward', ahead, nbytes[0], **facts)
    back = {}
    for name, call in calls.items():
        try:
            back[name] = trained(call, [x.detach().clone().requires_grad_() for x in inputs])
        except Exception as problem:
            bench.leave_out(f'{what} backward, {name}', problem)
    bench.row(f'{what} backward', back, nbytes[1], **facts)


def bench_scan(bench: Bench, batch: int, tokens: int, dtype: torch.dtype) -> None:
    shape = (2, batch, tokens, INNER)
    draw = dict(device=bench.device, dtype=dtype)
    u, z = torch.randn(shape, **draw), torch.randn(shape[1:], **draw)
    dt = 0.5 * torch.randn(shape, **draw) - 3
    B, C = torch.randn(2, *shape[:3], STATE, **draw)
    A = -torch.arange(1.0, STATE + 1, device=bench.device).repeat(2, INNER, 1)
    D, bias = torch.ones(2, INNER, device=bench.device), torch.zeros(2, INNER, device=bench.device)

    def ours(u, dt, A, B, C, D, z, bias):
        return bidirectional_selective_scan(u, dt, A, B, C, D, z, bias, dt_softplus=True)

    def eager(u, dt, A, B, C, D, z, bias):
        return bidirectional_selective_scan(u, dt, A, B, C, D, z, bias, dt_softplus=True, backend='torch')

    def flipped(u, dt, A, B, C, D, z, bias):
        y = None
        for k in range(2):
            turn = (lambda t: t.flip(1).mT.contiguous()) if k else (lambda t: t.mT.contiguous())
            out = scan(
                turn(u[k]), turn(dt[k]), A[k], turn(B[k]), turn(C[k]), D[k], turn(z), bias[k], delta_softplus=True
            )
            y = out.mT.flip(1) + y if k else out.mT
        return y

    calls = {'ours': ours}
    if tokens <= EAGER_LOOP_TOKENS:
        calls['eager'] = eager
    scan = models.peer('mamba_ssm.ops.selective_scan_interface', 'selective_scan_fn')
    if scan is not None and not bench.dry:
        calls['mamba_ssm'] = flipped
    wide, rows = u[0].nbytes, B[0].nbytes
    two_ways(
        bench, 'scan both', calls, [u, dt, A, B, C, D, z, bias], (6 * wide + 4 * rows, 11 * wide + 8 * rows),
        batch=batch, tokens=tokens, dtype=str(dtype)[6:],
    )  # fmt: skip


def bench_convolution(bench: Bench, batch: int, tokens: int, dtype: torch.dtype) -> None:
    x = torch.randn(batch, tokens, INNER, device=bench.device, dtype=dtype)
    weight, bias = torch.randn(2, INNER, 4, device=bench.device), torch.randn(2, INNER, device=bench.device)

    def eager(x, weight, bias):
        weight, bias = weight.to(dtype), bias.to(dtype)
        ys = []
        for k in range(2):
            first = x.mT.flip(2) if k else x.mT
            y = F.silu(F.conv1d(first, weight[k].unsqueeze(1), bias[k], padding=3, groups=INNER)[..., :tokens])
            ys.append(y.flip(2) if k else y)
        return torch.stack(ys)

    calls = {'ours': bidirectional_causal_conv1d, 'eager': eager}
    conv = models.peer('causal_conv1d', 'causal_conv1d_fn')
    if conv is not None and not bench.dry:

        def package(x, weight, bias):
            ahead, back = (conv(t.contiguous(), w, bias=b, activation='silu')
                           for t, w, b in zip((x.mT, x.mT.flip(2)), weight, bias, strict=True))  # fmt: skip
            return torch.stack([ahead, back.flip(2)])

        calls['causal_conv1d'] = package
    two_ways(
        bench, 'convolution both', calls, [x, weight, bias], (3 * x.nbytes, 4 * x.nbytes),
        batch=batch, tokens=tokens, dtype=str(dtype)[6:],
    )  # fmt: skip


def bench_norm(bench: Bench, batch: int, tokens: int, dtype: torch.dtype) -> None:
    x = torch.randn(batch, tokens, WIDTH, device=bench.device, dtype=dtype)
    residual = torch.randn(batch, tokens, WIDTH, device=bench.device)
    weight = torch.randn(WIDTH, device=bench.device)

    def eager(x, residual, weight):
        residual = residual + x
        return F.rms_norm(residual, (WIDTH,), weight, 1e-5).to(x.dtype), residual

    n, r = x.nbytes, residual.nbytes
    two_ways(
        bench, 'add and norm', {'ours': add_rms_norm, 'eager': eager}, [x, residual, weight],
        (2 * n + 2 * r, 2 * n + 3 * r), batch=batch, tokens=tokens, dtype=str(dtype)[6:],
    )  # fmt: skip


def sides_of_models(bench: Bench, tokens: int) -> dict[str, tuple[str, str]]:
    """Names of the sides: which model, and with what inside."""
    sides = {'ours': ('vim', 'ours'), 'deit sdpa': ('deit', 'sdpa'), 'deit materialised': ('deit', 'materialised')}
    if bench.device.type == 'cuda':
        sides['deit flash'] = ('deit', 'flash')
    if tokens <= EAGER_LOOP_TOKENS:
        sides['vim eager'] = ('vim', 'eager')
    if models.peer('mamba_ssm.ops.selective_scan_interface', 'selective_scan_fn') is not None and not bench.dry:
        sides['vim mamba_ssm'] = ('vim', 'mamba_ssm')
    return sides


def training(model: torch.nn.Module, *inputs: Tensor) -> Callable[[], object]:
    def step():
        y = model(*inputs)
        y = y[0] if isinstance(y, tuple) else y
        return torch.autograd.grad(y.sum(), [p for p in model.parameters() if p.requires_grad])

    return step


def bench_blocks(bench: Bench, batch: int, tokens: int, dtype: torch.dtype) -> None:
    hidden = torch.randn(batch, tokens, WIDTH, device=bench.device, dtype=dtype)
    residual = torch.randn(batch, tokens, WIDTH, device=bench.device)
    sides = {}
    for name, (kind, inside) in sides_of_models(bench, tokens).items():
        block = (models.VimBlock if kind == 'vim' else models.DeiTBlock)(WIDTH, inside)
        sides[name] = models.narrow(block.to(bench.device), dtype), (hidden, residual) if kind == 'vim' else (hidden,)
    floor = None
    if dtype == torch.bfloat16 and bench.device.type == 'cuda' and 'H100' in torch.cuda.get_device_name():
        floor = H100_BLOCK_FLOOR.get((batch, tokens))
    facts = dict(batch=batch, tokens=tokens, dtype=str(dtype)[6:])
    with torch.no_grad():
        calls = {name: (lambda block=block, x=x: block(*x)) for name, (block, x) in sides.items()}
        bench.row('block forward', calls, floor=floor, **facts)
    calls = {name: training(block, *x) for name, (block, x) in sides.items()}
    bench.row('block forward and backward', calls, **facts)


def build(bench: Bench, kind: str, inside: str, pixels: int, dtype: torch.dtype) -> torch.nn.Module:
    model = (models.Vim if kind == 'vim' else models.DeiT)(pixels, inside)
    return models.narrow(model.to(bench.device), dtype)


def bench_backbones(bench: Bench, batch: int, pixels: int, dtype: torch.dtype) -> None:
    image = torch.randn(batch, 3, pixels, pixels, device=bench.device, dtype=dtype)
    tokens = (pixels // 16) ** 2
    chosen = {name: pair for name, pair in sides_of_models(bench, tokens).items() if name != 'vim eager'}
    sides = {name: build(bench, *pair, pixels, dtype) for name, pair in chosen.items()}
    facts = dict(batch=batch, pixels=pixels, dtype=str(dtype)[6:])
    with torch.no_grad():
        calls = {name: (lambda model=model: model(image)) for name, model in sides.items()}
        bench.row('backbone forward', calls, **facts)
    calls = {name: training(model, image) for name, model in sides.items()}
    bench.row('backbone forward and backward', calls, graphs=False, **facts)


def bench_largest_batch(bench: Bench, pixels: int, dtype: torch.dtype) -> None:
    """Images a second at the largest power of two that fits, inference; each side on its own."""
    tokens, found = (pixels // 16) ** 2, {}
    for name, pair in sides_of_models(bench, tokens).items():
        if name == 'vim eager' or bench.out_of_time(f'largest batch {pixels} {name}'):
            continue
        model, batch = build(bench, *pair, pixels, dtype), 16
        while batch <= (16 if bench.dry else LARGEST_BATCH):
            try:
                image = torch.randn(batch, 3, pixels, pixels, device=bench.device, dtype=dtype)
                with torch.no_grad():
                    took = min(bench.microseconds(lambda model=model, image=image: model(image)) for _ in range(3))
            except Exception as problem:
                if not isinstance(problem, torch.OutOfMemoryError):
                    bench.leave_out(f'largest batch {pixels}, {name}', problem)
                break
            found[name] = {'batch': batch, 'images_per_s': batch / took * 1e6}
            batch *= 2
            if not bench.dry and time.monotonic() > bench.end:
                break
        del model
        image = None
        if not bench.dry:
            gc.collect()
            bench.api.empty_cache()
    bench.rows.append({'what': 'largest batch', 'pixels': pixels, 'dtype': str(dtype)[6:]} | found)
    for name, value in found.items():
        if not bench.dry:
            print(f'{pixels} px, {name}: {value["images_per_s"]:.0f} images/s at batch {value["batch"]}', flush=True)


def run_part(bench: Bench, part: str, batches: list[int], pixels: int, dtype: torch.dtype) -> None:
    tokens = (pixels // 16) ** 2
    if part == 'largest':
        bench_largest_batch(bench, pixels, dtype)
        return
    for batch in batches:
        if part == 'ops':
            for run in (bench_scan, bench_convolution, bench_norm):
                run(bench, batch, tokens, dtype)
        elif part == 'blocks':
            bench_blocks(bench, batch, tokens, dtype)
        else:
            bench_backbones(bench, batch, pixels, dtype)
        gc.collect()
        if not bench.dry:
            bench.api.empty_cache()


def find_device() -> str:
    for name in ('cuda', 'xpu'):
        if getattr(torch, name).is_available():
            return name
    raise SystemExit(
        'bench_gpu.py needs a GPU that PyTorch sees (CUDA, ROCm or XPU); torch '
        f'{torch.__version__} finds none. --dry-run checks the script itself on the CPU.'
    )


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument('--minutes', type=float, default=5.0, help='rows that begin later are left out, and named')
    parser.add_argument('--repeats', type=int, default=20)
    parser.add_argument('--pixels', type=int, nargs='+', help=f'default: {PIXELS}')
    parser.add_argument('--batches', type=int, nargs='+', default=BATCHES)
    parser.add_argument('--dtype', choices=('bfloat16', 'float16', 'float32'), default='bfloat16')
    parser.add_argument('--only', nargs='+', choices=('ops', 'blocks', 'backbones', 'largest'))
    parser.add_argument('--json', type=Path, help='default: results/gpu-DEVICE.json beside this script')
    parser.add_argument('--dry-run', action='store_true', help='every row on the CPU, without times and without a file')
    args = parser.parse_args()
    bench = Bench('cpu' if args.dry_run else find_device(), args.minutes, args.repeats, args.dry_run)
    dtype, only = getattr(torch, args.dtype), args.only or ('ops', 'blocks', 'backbones', 'largest')
    torch.manual_seed(0)
    about = machine(bench.device)
    print(', '.join(f'{key} {value}' for key, value in about.items()))
    check_numerics(bench, None if bench.dry else 'triton')
    if not bench.dry:
        bench.measure_bandwidth()
        print(f'copy: {bench.bandwidth:.0f} GB/s')
    pixels_list = args.pixels or ((32, 48) if bench.dry else PIXELS)
    # the first rows to be lost to the clock are the largest batches, and in each part the largest images
    for part in only:
        for pixels in pixels_list:
            run_part(bench, part, args.batches, pixels, dtype)
    for text in dict.fromkeys(bench.left_out):
        print(f'left out: {text}')
    if bench.dry:
        return
    peers = {name: models.peer(name, '__version__') for name in ('mamba_ssm', 'causal_conv1d')}
    result = about | {
        'copy_GB/s': bench.bandwidth, 'peers': peers, 'unit': 'us', 'rows': bench.rows,
        'left_out': list(dict.fromkeys(bench.left_out)),
    }  # fmt: skip
    slug = re.sub('[^a-z0-9]+', '-', about['device'].lower()).strip('-')
    path = args.json or HERE / 'results' / f'gpu-{slug}.json'
    path.parent.mkdir(exist_ok=True)
    path.write_text(json.dumps(result, indent=1) + '\n')
    print(f'written: {path}')


if __name__ == '__main__':
    main()
