# shellcheck shell=bash disable=SC2034  # the variables are for the scripts that source this
# Sourced by the job scripts, of which Slurm gives a job only a copy, and by those that `moelpr run --on slurm` writes.

fail() {
    echo "${SLURM_JOB_NAME:-slurm}: error: $1" >&2
    exit 2
}

# Read container options from the front of the arguments, and set
#   arguments  the rest
#   on_nodes   srun, with the container of pyxis if there is one
#   inside     the command prefix of an apptainer container, otherwise empty
#   root       the repository's path for the command
#   mounts     FROM:TO,… of folders that the container has
read_container_options() {
    local image="" runtime=""
    mounts=$PWD:$PWD
    while [[ ${1:-} =~ ^--(container-image|apptainer|container-mounts)$ ]]; do
        [[ -n ${2:-} ]] || fail "$1 expects a value"
        case $1 in
        --container-mounts) mounts+=,$2 ;;
        *) runtime=$1 image=$2 ;;
        esac
        shift 2
    done
    arguments=("$@")
    [[ -n $runtime || $mounts != *,* ]] || fail "--container-mounts requires --container-image or --apptainer"
    # No binding to cores: the node's single task starts a process per GPU. The script's variables reach the nodes also
    # after sbatch --export=NONE, which srun would repeat.
    on_nodes=(srun --export=ALL --kill-on-bad-exit=1 --cpu-bind=none)
    inside=() root=.
    if [[ -n $runtime ]]; then
        root=/opt/moelpr
        export PYTHONSAFEPATH=1 PYTHONNOUSERSITE=1 # the image's packages, not those in the current folder or in ~/.local
    fi
    case $runtime in
    --container-image)
        on_nodes+=(--container-image="$image" --container-mounts="$mounts" --container-workdir="$PWD")
        ;;
    --apptainer)
        inside=(apptainer exec --nv --bind "$mounts" --pwd "$PWD" "$image")
        ;;
    esac
}

# Print the path outside the container of $1, a path inside.
path_outside() {
    local path=$1 mount from to longest="" outside
    if [[ $path != /* ]]; then path=$PWD/$path; fi
    outside=$path
    for mount in ${mounts//,/ }; do
        IFS=: read -r from to _ <<<"$mount"
        to=${to:-$from} to=${to%/}
        if [[ $path/ == "$to"/* && ${#to} -ge ${#longest} ]]; then
            longest=$to outside=${from%/}${path#"$to"}
        fi
    done
    echo "$outside"
}

# What each node runs: $0 is the repository's path, the arguments are those of Python or a launcher with its own.
# shellcheck disable=SC2016  # the node's own variables
start='if [[ $1 == *.sh ]]; then exec "$@"; fi
    python=${MOELPR_PYTHON:-$0/.venv/bin/python}
    [[ -x $python ]] || { python=python3 && export PYTHONPATH=$0${PYTHONPATH:+:$PYTHONPATH}; }
    exec "$python" -P "$@"'

# run_tool ARGUMENTS…: become Python with these arguments, on one node.
run_tool() {
    export PYTHONWARNINGS=${PYTHONWARNINGS:-ignore} OMP_WAIT_POLICY=${OMP_WAIT_POLICY:-passive}
    exec "${on_nodes[@]}" "${inside[@]}" bash -c "$start" "$root" "$@"
}

is_preempted() { # in this start
    [[ $(scontrol --oneliner show job "$SLURM_JOB_ID") =~ \ PreemptTime=[0-9] ]]
}

# A job that is already requeued, by hand or because a node died, must stay so.
is_running() { [[ $(scontrol --oneliner show job "$SLURM_JOB_ID") =~ \ JobState=RUNNING ]]; }

# Whether Slurm itself requeues a preempted job that ends by itself. Versions before 24.05, and other modes of preemption,
# take its clean end for success. After the fifth start (MaxBatchRequeue), Slurm would hold the job.
slurm_requeues() {
    [[ $(scontrol --version) =~ ([0-9]+)\.([0-9]+) ]] && ((10#${BASH_REMATCH[1]}${BASH_REMATCH[2]} >= 2405)) || return 1
    ((${SLURM_RESTART_COUNT:-0} < 4)) || return 1
    [[ $(scontrol --oneliner show partition "${SLURM_JOB_PARTITION:-}") =~ PreemptMode=[^\ ]*REQUEUE ]]
}

# Slurm would also requeue a job that fails now if an earlier preemption took longer than its time of grace.
fail_for_good() {
    if is_running; then scontrol update JobId="$SLURM_JOB_ID" Requeue=0 || true; fi
    exit "$1"
}

saved_step() { cat "$save/latest_checkpointed_iteration.txt" 2>/dev/null || true; }

# Set torchrun's variables for all nodes.
prepare_nodes() {
    local first
    # The first node's address, because its name may not resolve; some sites do not show nodes.
    first=$(scontrol show hostnames "$SLURM_JOB_NODELIST" | head -n 1)
    MASTER_ADDR=$(scontrol --oneliner show node "$first" | sed -n 's/.* NodeAddr=\([^ ]*\).*/\1/p') || true
    MASTER_ADDR=${MASTER_ADDR:-$first} NNODES=$SLURM_NNODES
    # Any free port; this script runs on the first node.
    MASTER_PORT=${MASTER_PORT:-$((20000 + SLURM_JOB_ID % 10000))}
    while (: <"/dev/tcp/$MASTER_ADDR/$MASTER_PORT") 2>/dev/null; do MASTER_PORT=$((MASTER_PORT + 1)); done
    # A rank that remains from before a requeue must not join.
    PET_RDZV_ID=$SLURM_JOB_ID-${SLURM_RESTART_COUNT:-0}
    export NNODES MASTER_ADDR MASTER_PORT PET_RDZV_ID
    # Nodes take minutes to load an image, or Python's packages from a shared file system, and not the same time.
    if [[ $root != . ]]; then JOIN_TIMEOUT=${JOIN_TIMEOUT:-900}; fi
    export JOIN_TIMEOUT=${JOIN_TIMEOUT:-300}
    # The time of #SBATCH --signal, which Slurm does not tell a job.
    export MOELPR_GRACE_SECONDS=${MOELPR_GRACE_SECONDS:-300}
    # A node that stops cleanly exits with 0, because --kill-on-bad-exit ends the others after any other code.
    export MOELPR_STOPPED_IS_SUCCESS=1
}

# run_training SAVE ARGUMENTS…: on every node, run Python with these arguments, or a launcher with its own, which trains in
# the folder SAVE. Near the job's time limit and after a preemption, stop it cleanly and requeue the job.
run_training() {
    local save=$1 time_is_up=no code first_step failures=$1/FAILURES num_failures
    shift
    ((${SLURM_CPUS_ON_NODE:-1} >= ${SLURM_GPUS_ON_NODE:-1})) || fail "a node has ${SLURM_CPUS_ON_NODE} CPUs for $SLURM_GPUS_ON_NODE GPUs, and each rank needs several; pass --exclusive or --cpus-per-gpu, and memory (--mem 0 for all)"
    [[ ${SLURM_NTASKS:=$SLURM_NNODES} == "$SLURM_NNODES" ]] || fail "expected one task per node, which starts a rank per GPU, got $SLURM_NTASKS tasks on $SLURM_NNODES nodes; pass --ntasks-per-node 1"
    prepare_nodes

    # The trainer looks for the file STOP after every step; unlike a signal, it can't arrive too early.
    trap 'mkdir -p "$save" && touch "$save/STOP" && time_is_up=yes' USR1
    trap 'mkdir -p "$save" && touch "$save/STOP" && time_is_up=no' TERM # scancel: do not requeue
    rm -f "$save/STOP"
    first_step=$(saved_step)

    # shellcheck disable=SC2016  # the node's own variables
    "${on_nodes[@]}" "${inside[@]}" bash -c 'trap "" USR1
    export NODE_RANK=$SLURM_NODEID NPROC_PER_NODE=${NPROC_PER_NODE:-${SLURM_GPUS_ON_NODE:-}}
    '"$start" "$root" "$@" &
    while true; do
        wait $! && code=0 || code=$?
        kill -0 $! 2>/dev/null || break # otherwise a trapped signal has interrupted the wait
    done

    if [[ $code != 0 ]]; then
        if is_preempted; then exit "$code"; fi
        # Without progress it would fail again; code 2 are wrong settings. The file has a line for each start that has failed
        # since the last clean stop.
        num_failures=$(cat "$failures" 2>/dev/null | grep -c "job $SLURM_JOB_ID,") || true
        if [[ $code != 2 && $(saved_step) != "$first_step" ]] && ((num_failures < 4)) && is_running; then
            echo "$(date --iso-8601=seconds) job $SLURM_JOB_ID, exit code $code" >>"$failures"
            echo "$SLURM_JOB_NAME: failed after saving step $(saved_step); requeueing the job"
            scontrol requeue "$SLURM_JOB_ID"
            exit "$code"
        fi
        fail_for_good "$code"
    fi
    rm -f "$failures"
    if [[ -e $save/FINISHED ]] || [[ ${IS_SPARE:-} && -z $(saved_step) ]]; then
        exit # a spare training has ended without a step: an earlier task has decided that there is nothing to do
    elif is_preempted; then
        echo "$SLURM_JOB_NAME: preempted; the job is requeued"
        slurm_requeues || scontrol requeue "$SLURM_JOB_ID" # if Slurm does it too, the job runs twice
    elif [[ $time_is_up == yes ]]; then
        echo "$SLURM_JOB_NAME: the time limit is near; requeueing the job"
        scontrol requeue "$SLURM_JOB_ID"
    else
        echo "$SLURM_JOB_NAME: stopped manually before its last step; submit the job again to resume" >&2
        fail_for_good 1 # jobs that depend on this stage must not start
    fi
}
