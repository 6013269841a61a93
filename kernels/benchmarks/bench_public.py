"""Times a Mamba mixer and its scan against other public CPU paths: all sides in one process, in turn, medians.

    pip install mambapy transformers
    python kernels/benchmarks/bench_public.py --length 4096

The sides have the same parameters; no time is printed unless they agree. One direction, batch 1, float32, no gradients.
transformers' mixer loops over the tokens in Python; mambapy's is a parallel scan in PyTorch.
"""

from __future__ import annotations

import argparse
import importlib.metadata
import json
import sys
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import nn

sys.path.insert(0, str(Path(__file__).resolve().parent))

from bench_selective_scan import machine, median_times  # noqa: E402

from mmvim.models.layers import VimMixer  # noqa: E402
from ssm_kernels import selective_scan  # noqa: E402


def mixers(width: int) -> dict[str, nn.Module]:
    from mambapy.mamba import MambaBlock
    from mambapy.mamba import MambaConfig as MambapyConfig
    from transformers import MambaConfig
    from transformers.models.mamba.modeling_mamba import MambaMixer

    torch.manual_seed(0)
    ours = VimMixer(width, directions='none')
    others = {
        'mambapy': MambaBlock(MambapyConfig(d_model=width, n_layers=1, pscan=True)),
        'transformers': MambaMixer(MambaConfig(hidden_size=width, state_size=16, num_hidden_layers=1), layer_idx=0),
    }
    for other in others.values():
        other.load_state_dict(ours.state_dict())
    return {name: mixer.eval() for name, mixer in ({'numba': ours} | others).items()}


def output(y: torch.Tensor | tuple) -> torch.Tensor:
    return y[0] if isinstance(y, tuple) else y


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument('--length', type=int, nargs='+', default=[1024, 4096])
    parser.add_argument('--width', type=int, default=192, help='of the mixer; the scan has twice as many channels')
    parser.add_argument('--repeats', type=int, default=5)
    parser.add_argument('--json', type=Path)
    args = parser.parse_args()
    sides = mixers(args.width)
    about = machine() | {name: importlib.metadata.version(name) for name in sides if name != 'numba'}
    print(', '.join(f'{key} {value}' for key, value in about.items()))
    rows = []
    for length in args.length:
        x = torch.randn(1, length, args.width)
        inner, n = 2 * args.width, 16
        u, z = torch.randn(2, 1, length, inner)
        dt = torch.randn(1, length, inner) - 3
        B, C = torch.randn(2, 1, length, n)
        A, D = -torch.arange(1.0, n + 1).repeat(inner, 1), torch.ones(inner)
        pscan = sides['mambapy'].selective_scan

        def scan(u=u, dt=dt, A=A, B=B, C=C, D=D, z=z):
            return selective_scan(u, dt, A, B, C, D, z, dt_softplus=True)

        def parallel_scan(u=u, dt=dt, A=A, B=B, C=C, D=D, z=z, pscan=pscan):
            return pscan(u, F.softplus(dt), A, B, C, D) * F.silu(z)

        calls = {
            'mixer': {name: lambda mixer=mixer, x=x: mixer(x) for name, mixer in sides.items()},
            'scan': {'numba': scan, 'mambapy': parallel_scan},
        }
        with torch.no_grad():
            for what, of in calls.items():
                want = output(of['numba']())
                for name, call in of.items():
                    if not torch.allclose(output(call()), want, rtol=1e-3, atol=1e-4):
                        raise SystemExit(f'no times: the {what} of {name} differs')
                times = median_times(of, args.repeats)
                row = {'what': what, 'L': length, 'D': inner} | {f'{name}_ms': 1e3 * s for name, s in times.items()}
                rows.append(about | row)
                text = [f'{name} {1e3 * s:.1f} ms' for name, s in times.items()]
                text += [f'{name} / numba {s / times["numba"]:.1f}' for name, s in times.items() if name != 'numba']
                print(f'{what} L={length} D={inner} N={n}: ' + ', '.join(text), flush=True)
    if args.json:
        args.json.write_text(json.dumps(rows, indent=1) + '\n')


if __name__ == '__main__':
    main()
