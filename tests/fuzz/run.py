"""Carry out random calls of all ops of ssm_kernels on the CPU and compare them with float64.

python tests/fuzz/run.py --calls 10000 --seed 0

Calls come in blocks of 50, which run one after the other, on 8 Python threads at once, or in a forked child, with 1 to
8 threads of PyTorch each. A block that takes longer than LIMIT counts as hanging: all stacks are printed.
"""

import argparse
import faulthandler
import os
import random
import sys
import time
import traceback
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parent))

import torch
from operator_calls import draw, problems

BLOCK, LIMIT = 50, 600
MODES = ('serial', 'threads', 'forked')


def attempt(number: int) -> list[str]:
    try:
        return problems(draw(number))
    except Exception:  # of the reference, or of this script
        return [f'call {number}: {traceback.format_exc()}']


def in_a_child(numbers: range) -> list[str]:
    read, write = os.pipe()
    child = os.fork()
    if child == 0:
        torch.set_num_threads(1)  # PyTorch's own OpenMP threads do not survive a fork; data loaders do the same
        text = '\n'.join(line for number in numbers for line in attempt(number))
        with os.fdopen(write, 'w') as file:
            file.write(text)
        os._exit(0)
    os.close(write)
    with os.fdopen(read) as file:
        found = file.read().splitlines()
    status = os.waitpid(child, 0)[1]
    return found + ([f'calls {numbers}: a forked child ended with status {status}'] if status else [])


def carry_out_block(numbers: range, mode: str) -> list[str]:
    if mode == 'forked':
        return in_a_child(numbers)
    if mode == 'threads':
        with ThreadPoolExecutor(8) as pool:
            return [line for found in pool.map(attempt, numbers) for line in found]
    return [line for number in numbers for line in attempt(number)]


def resident() -> float:
    """Memory of this process in MiB."""
    return int(Path('/proc/self/statm').read_text().split()[1]) * os.sysconf('SC_PAGE_SIZE') / 2**20


def run(seed: int, calls: int) -> tuple[list[str], float]:
    """Problems, and by how many MiB the memory grew after the first third."""
    dice = random.Random(seed)
    found, early, threads = [], None, torch.get_num_threads()
    for start in range(0, calls, BLOCK):
        numbers = range(seed * 1_000_000 + start, seed * 1_000_000 + min(start + BLOCK, calls))
        mode = MODES[start // BLOCK % len(MODES)]
        torch.set_num_threads(dice.choice((1, 1, 2, 3, 8)))
        faulthandler.dump_traceback_later(LIMIT, exit=True)
        found += carry_out_block(numbers, mode)
        if early is None and start >= calls // 3:
            early = resident()
    faulthandler.cancel_dump_traceback_later()
    torch.set_num_threads(threads)
    return found, resident() - early


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument('--calls', type=int, default=10_000)
    parser.add_argument('--seed', type=int, default=0)
    parser.add_argument('--only', type=int, help='one call by its number, as the messages have it')
    args = parser.parse_args()
    if args.only is not None:
        print('\n'.join(attempt(args.only)) or f'{draw(args.only)}: fine')
        return
    start = time.perf_counter(), time.process_time()
    found, grown = run(args.seed, args.calls)
    print('\n'.join(found))
    print(
        f'{args.calls} calls with seed {args.seed}: {len(found)} problems, memory grew by {grown:.0f} MiB after the '
        f'first third, {time.perf_counter() - start[0]:.0f} s, {time.process_time() - start[1]:.0f} s of CPU'
    )
    sys.exit(bool(found))


if __name__ == '__main__':
    main()
