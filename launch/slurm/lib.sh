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
    while [[ ${1:-} =~ ^--(container-image|apptainer|container-mounts)$ ]]; do
        [[ -n ${2:-} ]] || fail "$1 has no value"
        case $1 in
        --container-mounts) mounts+=,$2 ;;
        *) runtime=$1 image=$2 ;;
        esac
        shift 2
    done
    words=("$@")
    [[ -n $runtime || $mounts != *,* ]] || fail "--container-mounts needs --container-image or --apptainer"
    # No binding to cores: a node's one task starts a process per GPU.
    on_nodes=(srun --kill-on-bad-exit=1 --cpu-bind=none)
    inside=() root=.
    if [[ -n $runtime ]]; then
        root=/opt/moelpr
        export PYTHONSAFEPATH=1 # the image's packages, not those of the folder it is started in
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
