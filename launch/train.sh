#!/usr/bin/env bash
# Starts one training stage on this node with torchrun. Called by stage1.sh, stage2.sh and dense.sh.
#
# Launcher's own words, as torchrun spells them (dashes or underscores, "--nnodes 2" or "--nnodes=2"), or a variable:
#   --nproc-per-node  NPROC_PER_NODE  processes on this node (default: its GPUs, or 1 without any)
#   --nnodes          NNODES          nodes (default: 1)
#   --node-rank       NODE_RANK       this node, 0 to nnodes-1
#   --master-addr     MASTER_ADDR     name or address of node 0
#   --master-port     MASTER_PORT     a free port of node 0 (default: 29500; one node alone: any free one)
#   --join-timeout    JOIN_TIMEOUT    seconds in which all nodes must have come (default: 45)
#   --dry-run                         print the command with every variable set here, and don't run it
#
# Every other word goes to the trainer: .venv/bin/python -m moelpr.pretrain --help lists its flags. docs/running.md
# has examples.
set -euo pipefail
root=$(cd "$(dirname "${BASH_SOURCE[0]}")/.." && pwd)

fail() {
    echo "$stage.sh: error: $1" >&2
    exit 2
}

stage=$1
shift
dry_run=no
words=()
while (($#)); do
    word=${1%%=*}
    case ${word//_/-} in
    --dry-run) dry_run=yes ;;
    -h | --help) exec sed -n '4,/^set/s/^# \{0,1\}//p' "${BASH_SOURCE[0]}" ;;
    --nproc-per-node | --nnodes | --node-rank | --master-addr | --master-port | --join-timeout)
        name=${word#--} name=${name//-/_}
        if [[ $1 != *=* ]]; then
            [[ -n ${2:-} && ${2:-} != --* ]] || fail "$word has no value; give $word VALUE"
            set -- "$1=$2" "${@:3}"
        fi
        declare "${name^^}=${1#*=}"
        ;;
    *) words+=("$1") ;;
    esac
    shift
done

# The GPUs this process may see, without asking the driver, which would add to every start.
shopt -s nullglob
devices=(/dev/nvidia[0-9]*)
[[ -z ${CUDA_VISIBLE_DEVICES+set} ]] || IFS=, read -ra devices <<<"$CUDA_VISIBLE_DEVICES"
gpus=${#devices[@]}
[[ ${devices[0]:-} != -1 && ${devices[0]:-} != NoDevFiles ]] || gpus=0

nnodes=${NNODES:-1}
nproc_per_node=${NPROC_PER_NODE:-$((gpus > 0 ? gpus : 1))}
for setting in "--nnodes $nnodes" "--nproc-per-node $nproc_per_node" "--master-port ${MASTER_PORT:-29500}" \
    "--join-timeout ${JOIN_TIMEOUT:-45}"; do
    [[ ${setting#* } =~ ^[1-9][0-9]*$ ]] || fail "$setting must be a whole number of at least 1"
done
if [[ $nnodes == 1 && -z ${MASTER_PORT:-} ]]; then
    where=(--standalone) # a free port, so that two runs on one machine never collide
else
    node_rank=${NODE_RANK:-$([[ $nnodes != 1 ]] || echo 0)}
    master_addr=${MASTER_ADDR:-$([[ $nnodes != 1 ]] || echo 127.0.0.1)}
    [[ -n $node_rank ]] || fail "$nnodes nodes need a number each; give --node-rank 0 to $((nnodes - 1))"
    if [[ ! $node_rank =~ ^[0-9]+$ ]] || ((10#$node_rank >= nnodes)); then
        fail "--node-rank $node_rank is none of $nnodes nodes; give 0 to $((nnodes - 1))"
    fi
    [[ -n $master_addr ]] || fail "$nnodes nodes meet at node 0; give its name or address with --master-addr"
    where=(--nnodes "$nnodes" --node-rank "$node_rank"
        --master-addr "$master_addr" --master-port "${MASTER_PORT:-29500}"
        ${JOIN_TIMEOUT:+--rdzv-conf "timeout=$JOIN_TIMEOUT"})
fi

variables=()
# Exports $1 with the value $2, unless the user has set it.
default() {
    export "$1=${!1:-$2}"
    variables+=("$1=${!1}")
}

# One queue into the GPU: kernels start in the order of their launch, so that a collective launched before the GEMM that
# hides it does not wait behind that GEMM. Up to Hopper, Megatron refuses tensor and context parallelism without it.
# Since Blackwell nothing needs it, and --overlap-moe-expert-parallel-comm wants more queues (32) on every GPU.
default CUDA_DEVICE_MAX_CONNECTIONS 1
# Ranks share the cores: more threads than that wait for each other, and threads that wait must not spin on a core.
cores=$(($(nproc) / nproc_per_node))
default OMP_NUM_THREADS $((cores > 1 ? cores : 1))
default OMP_WAIT_POLICY passive
# One line per import of each rank about packages that are optional.
default PYTHONWARNINGS ignore
if ((gpus > 0)); then
    # NCCL is silent by default; at this level it says why it fails. The network's own settings belong to the site.
    default NCCL_DEBUG WARN
    # A rank whose collective fails or hangs ends, and torchrun the others, instead of keeping the GPUs; and it writes
    # down each rank's last collectives. PyTorch's defaults today, set because "no hang" depends on them.
    default TORCH_NCCL_ASYNC_ERROR_HANDLING 3
    default TORCH_NCCL_DUMP_ON_TIMEOUT 1
else
    # glibc would return every large tensor to the system and have its pages zeroed again in the next step.
    default MALLOC_MMAP_MAX_ 0
    default MALLOC_TRIM_THRESHOLD_ 17179869184
fi
python=$root/.venv/bin/python
if [[ ! -x $python ]]; then
    python=python3 # a container or an environment of one's own, with the packages of setup.py installed
    export PYTHONPATH=$root${PYTHONPATH:+:$PYTHONPATH}
    variables+=("PYTHONPATH=$PYTHONPATH")
fi

command=("$python" -m moelpr.torchrun "${where[@]}" --nproc-per-node "$nproc_per_node"
    -m moelpr.pretrain --stage "$stage" "${words[@]}")
if [[ $dry_run == yes ]]; then
    printf -v line '%q ' "${variables[@]}" "${command[@]}"
    echo "${line% }"
    exit
fi
exec "${command[@]}"
