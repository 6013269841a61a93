#!/usr/bin/env bash
# For a machine with a GPU: the tests marked gpu, then bench_gpu.py, which writes one JSON file under results/.
# Needs torch, triton and pytest; no OpenMMLab, no compiler of CUDA code. Ends within about 8 minutes.
#
#   kernels/benchmarks/run_gpu.sh [OPTIONS OF bench_gpu.py]
#
# PYTHON        interpreter, default python
# MINUTES       for all, default 8
# TEST_SECONDS  for the tests, default 240; kernels are compiled there, so few cores need more
# ALL_TESTS=1   also the long tables of cases (needs a larger TEST_SECONDS and MINUTES)
set -euo pipefail
cd "$(dirname "$0")/../.."
python=${PYTHON:-python}
minutes=${MINUTES:-8}
test_seconds=${TEST_SECONDS:-240}
export PYTHONPATH="$PWD/kernels${PYTHONPATH:+:$PYTHONPATH}"
unset TRITON_INTERPRET
SECONDS=0

"$python" - <<'CHECK'
import importlib.util
import sys

missing = [name for name in ('torch', 'triton', 'pytest') if importlib.util.find_spec(name) is None]
if missing:
    sys.exit(f'run_gpu.sh: {sys.executable} lacks {", ".join(missing)} (pip install {" ".join(missing)})')
import torch

if not (torch.cuda.is_available() or torch.xpu.is_available()):
    sys.exit(f'run_gpu.sh: torch {torch.__version__} sees no GPU (CUDA, ROCm or XPU)')
CHECK

logs=$(mktemp -d)
trap 'rm -rf "$logs"' EXIT
short='not test_shared_cases'
[ "${ALL_TESTS:-0}" = 1 ] && short='test'
groups=(
  "selective_scan test_float32 and both"
  "selective_scan test_float32 and not both"
  "selective_scan $short and not test_float32"
  "causal_conv1d $short"
  "add_rms_norm $short"
)
pids=()
for i in "${!groups[@]}"; do
  read -r op chosen <<< "${groups[$i]}"
  # most of the time goes into compiling, hence at once; the cut keeps out the conftest that loads OpenMMLab
  timeout "$test_seconds" "$python" -m pytest "tests/kernels/test_${op}_triton.py" -m gpu -k "$chosen" -q \
    --confcutdir=tests/kernels -p no:cacheprovider > "$logs/$i" 2>&1 &
  pids+=($!)
done
failed=0
for i in "${!groups[@]}"; do
  status=0
  wait "${pids[$i]}" || status=$?
  if [ "$status" -ne 0 ]; then
    failed=1
    cat "$logs/$i"
    [ "$status" -eq 124 ] && echo "run_gpu.sh: these tests took more than $test_seconds s; set TEST_SECONDS"
  fi
  echo "tests of ${groups[$i]}: $(tail -n 1 "$logs/$i")"
done
if [ "$failed" -ne 0 ]; then
  echo 'run_gpu.sh: nothing is timed, because tests failed' >&2
  exit 1
fi

left=$("$python" -c "print(max(0.5, $minutes - ($SECONDS + 20) / 60))")
"$python" kernels/benchmarks/bench_gpu.py --minutes "$left" "$@"
