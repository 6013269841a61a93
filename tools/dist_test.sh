#!/usr/bin/env bash
# Test in several processes on one machine or more: dist_test.sh CONFIG CHECKPOINT PROCESSES [arguments of test.py]
set -euo pipefail
if [ $# -lt 3 ]; then
    echo "usage: [NNODES=1 NODE_RANK=0 MASTER_ADDR=127.0.0.1 PORT=29500] $0 CONFIG CHECKPOINT PROCESSES" \
        "[test.py arguments]" >&2
    exit 2
fi
config=$1 checkpoint=$2 processes=$3
exec torchrun --nnodes="${NNODES:-1}" --node_rank="${NODE_RANK:-0}" --master_addr="${MASTER_ADDR:-127.0.0.1}" \
    --master_port="${PORT:-29500}" --nproc_per_node="$processes" \
    "$(dirname "$0")/test.py" "$config" "$checkpoint" --launcher pytorch "${@:4}"
