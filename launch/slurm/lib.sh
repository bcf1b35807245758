# shellcheck shell=bash disable=SC2034  # variables are for whoever sources this
# Sourced by the job scripts. They are run from the repository's folder: Slurm gives a job a copy of the script alone.

fail() {
    echo "${SLURM_JOB_NAME:-slurm}: error: $1" >&2
    exit 2
}

# Takes container flags from the front of the arguments and leaves
#   words      what follows them
#   on_nodes   srun, with the container of pyxis where there is one
#   inside     what starts a command in apptainer's container, empty elsewhere
#   root       the repository as the command sees it
read_container_flags() {
    local image="" runtime="" mounts=$PWD:$PWD
    while [[ ${1:-} == --* ]]; do
        case $1 in
        --container-image | --apptainer) runtime=$1 image=${2:?"$1 needs an image"} ;;
        --container-mounts) mounts+=,${2:?"$1 needs FROM:TO[,FROM:TO…]"} ;;
        *) break ;;
        esac
        shift 2
    done
    words=("$@")
    # No binding to cores: a node's one task starts a process per GPU.
    on_nodes=(srun --kill-on-bad-exit=1 --cpu-bind=none)
    inside=() root=.
    case $runtime in
    --container-image)
        root=/opt/moelpr
        on_nodes+=(--container-image="$image" --container-mounts="$mounts" --container-workdir="$PWD")
        ;;
    --apptainer)
        root=/opt/moelpr
        inside=(apptainer exec --nv --bind "$mounts" --pwd "$PWD" "$image")
        ;;
    esac
}
