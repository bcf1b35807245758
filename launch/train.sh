#!/usr/bin/env bash
# Starts one training stage on this node with torchrun. Called by stage1.sh, stage2.sh and dense.sh; every argument
# goes to the trainer (python -m moelpr.pretrain --help). Settings of the launcher itself are torchrun's own variables:
#   NPROC_PER_NODE  processes on this node (default: its GPUs, or 1 without any)
#   NNODES, NODE_RANK, MASTER_ADDR, MASTER_PORT  several nodes (default: this one alone)
# With --dry-run as the first argument the command is printed, not run.
set -euo pipefail
root=$(cd "$(dirname "$0")/.." && pwd)

dry_run=no
if [[ ${2:-} == --dry-run ]]; then
    dry_run=yes
    set -- "$1" "${@:3}"
fi
stage=$1
shift

python=$root/.venv/bin/python
if [[ ! -x $python ]]; then
    python=python3 # a container or an environment of one's own, with the packages of setup.py installed
    export PYTHONPATH=$root${PYTHONPATH:+:$PYTHONPATH}
fi

gpus=$( (nvidia-smi -L 2>/dev/null || true) | grep -c '^GPU' || true)
nproc_per_node=${NPROC_PER_NODE:-$((gpus > 0 ? gpus : 1))}

if [[ ${NNODES:-1} == 1 ]]; then
    where=(--standalone) # a free port, so that two runs on one machine never collide
else
    where=(--nnodes "$NNODES" --node-rank "${NODE_RANK:?set NODE_RANK (0 to NNODES-1) for several nodes}"
        --master-addr "${MASTER_ADDR:?set MASTER_ADDR (host name of node 0) for several nodes}"
        --master-port "${MASTER_PORT:-29500}")
fi

# Megatron's tensor and sequence parallelism rely on communication being launched before the GEMM that hides it.
export CUDA_DEVICE_MAX_CONNECTIONS=${CUDA_DEVICE_MAX_CONNECTIONS:-1}
# Ranks share the cores: more threads than that only spin against each other.
if [[ -z ${OMP_NUM_THREADS:-} ]]; then
    cores=$(($(nproc) / nproc_per_node))
    export OMP_NUM_THREADS=$((cores > 1 ? cores : 1))
fi
export OMP_WAIT_POLICY=${OMP_WAIT_POLICY:-passive}
# One line per import of each rank about packages that are optional.
export PYTHONWARNINGS=${PYTHONWARNINGS:-ignore}

command=("$python" -m moelpr.torchrun "${where[@]}" --nproc-per-node "$nproc_per_node"
    -m moelpr.pretrain --stage "$stage" "$@")
if [[ $dry_run == yes ]]; then
    printf 'CUDA_DEVICE_MAX_CONNECTIONS=%s OMP_NUM_THREADS=%s' "$CUDA_DEVICE_MAX_CONNECTIONS" "$OMP_NUM_THREADS"
    printf ' %q' "${command[@]}"
    echo
    exit 0
fi
exec "${command[@]}"
