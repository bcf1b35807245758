# shellcheck shell=bash disable=SC2034  # the variables are for the scripts that source this
# Sourced by the job scripts, which run in the repository root: Slurm gives a job only a copy of its script.

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
