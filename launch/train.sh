#!/usr/bin/env bash
# Start one training stage on this node with torchrun. Called by stage0.sh, stage1.sh, stage2.sh, sft.sh, dense.sh, ffn.sh:
#
#   launch/STAGE.sh [LAUNCHER OPTIONS] [TRAINER ARGUMENTS]
#
# Launcher options, spelled as torchrun's (dashes or underscores, "--nnodes 2" or "--nnodes=2"), or variables:
#   --nproc-per-node  NPROC_PER_NODE  number of processes on this node (default: its number of GPUs, or 1 without GPUs)
#   --nnodes          NNODES          number of nodes (default: 1)
#   --node-rank       NODE_RANK       rank of this node, 0 to nnodes-1 (required with several nodes)
#   --master-addr     MASTER_ADDR     name or address of node 0 (required with several nodes)
#   --master-port     MASTER_PORT     a free port of node 0 (default: 29500; on a single node any free port)
#   --join-timeout    JOIN_TIMEOUT    timeout for nodes to join, in seconds (default: 45)
#   --dry-run                         print the command and the variables set here instead of running it
#
# Options override environment variables. What neither gives is taken from torchrun's variables, which Kubeflow sets
# (PET_NNODES, PET_NODE_RANK, PET_NPROC_PER_NODE, PET_MASTER_ADDR, PET_MASTER_PORT), from JOB_COMPLETION_INDEX (the node
# rank in an Indexed Job or JobSet), and from Slurm's, if srun has started this script on several nodes.
# All other arguments go to the trainer. Examples are in docs/running.md.
set -euo pipefail
root=$(cd "$(dirname "${BASH_SOURCE[0]}")/.." && pwd)

fail() {
    echo "$stage.sh: error: $1" >&2
    exit 2
}

# The Python is that of `moelpr train`, of the repository's .venv, or, in an installed package, of its environment; in a
# container or another environment with the packages of setup.py, the one on PATH.
variables=()
python=${MOELPR_PYTHON:-$root/.venv/bin/python}
is_installed=$([[ ! -f $root/__init__.py ]] || echo yes)
if [[ ! -x $python && -n $is_installed ]]; then
    python=$root/../../../../bin/python3
fi
if [[ ! -x $python ]]; then
    python=python3
fi
if [[ $python == python3 && -z $is_installed ]]; then
    export PYTHONPATH=$root${PYTHONPATH:+:$PYTHONPATH}
    variables+=("PYTHONPATH=$PYTHONPATH")
fi

stage=$1
shift
dry_run=no
arguments=()
while (($#)); do
    option=${1%%=*}
    case ${option//_/-} in
    --dry-run) dry_run=yes ;;
    -h | --help)
        sed -n '2,/^set/{/^set/d;s/^# \{0,1\}//p;}' "${BASH_SOURCE[0]}"
        echo
        exec "$python" -m moelpr.pretrain --help
        ;;
    --nproc-per-node | --nnodes | --node-rank | --master-addr | --master-port | --join-timeout)
        name=${option#--} name=${name//-/_}
        if [[ $1 != *=* ]]; then
            [[ -n ${2:-} && ${2:-} != --* ]] || fail "$option expects a value; pass $option VALUE"
            set -- "$1=$2" "${@:3}"
        fi
        declare "${name^^}=${1#*=}"
        ;;
    *) arguments+=("$1") ;;
    esac
    shift
done

# The GPUs visible to this process. Asking the driver would slow down every start, but WSL2 has no devices.
shopt -s nullglob
devices=(/dev/nvidia[0-9]*)
if ((${#devices[@]} == 0)) && [[ -e /dev/dxg ]]; then mapfile -t devices < <(nvidia-smi -L 2>/dev/null); fi
[[ -z ${CUDA_VISIBLE_DEVICES+set} ]] || IFS=, read -ra devices <<<"$CUDA_VISIBLE_DEVICES"
gpus=${#devices[@]}
[[ ${devices[0]:-} != -1 && ${devices[0]:-} != NoDevFiles ]] || gpus=0

if [[ -z ${NNODES:-}${PET_NNODES:-} ]] && ((${SLURM_STEP_NUM_NODES:-1} > 1)); then
    ((SLURM_STEP_NUM_TASKS == SLURM_STEP_NUM_NODES)) ||
        fail "srun has started $SLURM_STEP_NUM_TASKS tasks on $SLURM_STEP_NUM_NODES nodes, and one per node starts all ranks; pass srun --ntasks-per-node 1"
    PET_NNODES=$SLURM_STEP_NUM_NODES PET_NODE_RANK=${PET_NODE_RANK:-$SLURM_NODEID}
    PET_MASTER_ADDR=${PET_MASTER_ADDR:-$(scontrol show hostnames "$SLURM_STEP_NODELIST" 2>/dev/null | head -n 1 || true)}
    PET_MASTER_PORT=${PET_MASTER_PORT:-$((20000 + SLURM_JOB_ID % 10000))}
fi
nnodes=${NNODES:-${PET_NNODES:-1}}
[[ $nnodes != "${nnodes#*:}:${nnodes#*:}" ]] || nnodes=${nnodes#*:} # torchrun's MIN:MAX
node_rank=${NODE_RANK:-${PET_NODE_RANK:-}}
[[ $nnodes == 1 ]] || node_rank=${node_rank:-${JOB_COMPLETION_INDEX:-}}
MASTER_ADDR=${MASTER_ADDR:-${PET_MASTER_ADDR:-}}
MASTER_PORT=${MASTER_PORT:-${PET_MASTER_PORT:-}}
nproc_per_node=${NPROC_PER_NODE:-${PET_NPROC_PER_NODE:-auto}}
case $nproc_per_node in
auto) nproc_per_node=$((gpus > 0 ? gpus : 1)) ;;
gpu) nproc_per_node=$gpus ;;
cpu) nproc_per_node=$(nproc) ;;
esac
for setting in "--nnodes $nnodes" "--nproc-per-node $nproc_per_node" "--master-port ${MASTER_PORT:-29500}" \
    "--join-timeout ${JOIN_TIMEOUT:-45}"; do
    [[ ${setting#* } =~ ^[1-9][0-9]*$ ]] || fail "${setting% *} must be a positive integer, got ${setting#* }"
done
if [[ $nnodes == 1 && -z ${MASTER_PORT:-} ]]; then
    where=(--standalone --nnodes 1) # any free port, so that two runs on one machine never collide
else
    if [[ $nnodes == 1 ]]; then node_rank=${node_rank:-0} MASTER_ADDR=${MASTER_ADDR:-127.0.0.1}; fi
    [[ -n $node_rank ]] || fail "--nnodes $nnodes requires --node-rank; pass 0 to $((nnodes - 1))"
    if [[ ! $node_rank =~ ^[0-9]+$ ]] || ((10#$node_rank >= nnodes)); then
        fail "--node-rank must be an integer from 0 to $((nnodes - 1)), got $node_rank"
    fi
    [[ -n $MASTER_ADDR ]] || fail "--nnodes $nnodes requires --master-addr; pass the name or address of node 0"
    where=(--nnodes "$nnodes" --node-rank "$node_rank"
        --master-addr "$MASTER_ADDR" --master-port "${MASTER_PORT:-29500}"
        ${JOIN_TIMEOUT:+--rdzv-conf "timeout=$JOIN_TIMEOUT"})
fi

# Export variable $1 with the value $2, unless the user has set it.
default() {
    export "$1=${!1:-$2}"
    variables+=("$1=${!1}")
}

# A single queue to the GPU: kernels start in the order of their launch, so a collective launched before the GEMM that
# overlaps it does not wait for that GEMM. Up to Hopper, Megatron requires this for tensor and context parallelism.
# Since Blackwell nothing requires it.
default CUDA_DEVICE_MAX_CONNECTIONS 1
# Otherwise each rank warns about optional packages at every import.
default PYTHONWARNINGS ignore
if ((gpus > 0)); then
    # NCCL is silent by default; at this level it reports why it fails. Settings of the network are the site's.
    default NCCL_DEBUG WARN
    # A rank whose collective fails or hangs exits (and torchrun ends the others) instead of blocking the GPUs, and
    # dumps each rank's last collectives. These are PyTorch's defaults, set here because we depend on them.
    default TORCH_NCCL_ASYNC_ERROR_HANDLING 3
    default TORCH_NCCL_DUMP_ON_TIMEOUT 1
    # The number of rows of an expert changes in every layer and step, which leaves gaps in blocks of fixed size.
    [[ -n ${PYTORCH_ALLOC_CONF:-} ]] || default PYTORCH_CUDA_ALLOC_CONF expandable_segments:True
else
    # Otherwise glibc returns every large tensor to the system, whose pages are zeroed again in the next step.
    default MALLOC_MMAP_MAX_ 0
    default MALLOC_TRIM_THRESHOLD_ 17179869184
fi

command=("$python" -m moelpr.torchrun "${where[@]}" --nproc-per-node "$nproc_per_node"
    -m moelpr.pretrain --stage "$stage" "${arguments[@]}")
if [[ $dry_run == yes ]]; then
    printf -v line '%q ' "${variables[@]}" "${command[@]}"
    echo "${line% }"
    exit
fi
exec "${command[@]}"
