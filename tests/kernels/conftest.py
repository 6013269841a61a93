"""Test modules of this folder import the cases of the benchmarks, and triton_runs beside them, by their plain names."""

import sys
from pathlib import Path

HERE = Path(__file__).parent
sys.path[:0] = [str(HERE), str(HERE.parents[1] / 'kernels' / 'benchmarks')]
