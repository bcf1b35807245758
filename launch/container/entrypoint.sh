#!/usr/bin/env bash
# Entry point of the container: a subcommand of moelpr, or any other command.
#   docker run … moelpr train stage1 --recipe /opt/moelpr/launch/recipes/paper-stage1.yaml …
#   docker run … moelpr data preprocess --help
#   docker run … moelpr bash
set -euo pipefail
root=$(cd "$(dirname "${BASH_SOURCE[0]}")/../.." && pwd)
python=$root/launch/python.sh

# NVIDIA's entry point checks the driver and prints a banner: only for training and unknown commands.
prepare=()
[[ ! -x /opt/nvidia/nvidia_entrypoint.sh ]] || prepare=(/opt/nvidia/nvidia_entrypoint.sh)

command=${1:---help}
shift || true
case ${command//-/_} in
__help | _h)
    "$python" -m moelpr --help
    printf '\n%s\n' "In the image also: first_contact, which tries the GPUs of this machine, and any other command (bash)."
    exit
    ;;
first_contact) exec "${prepare[@]}" "$root/launch/first_contact.sh" "$@" ;;
pretrain | torchrun) exec "${prepare[@]}" "$python" -m "moelpr.$command" "$@" ;;
train | run) exec "${prepare[@]}" "$python" -m moelpr "$command" "$@" ;;
esac
if "$python" -c 'import sys; from moelpr.__main__ import find; find(sys.argv[1:])' "$command" "$@" 2>/dev/null; then
    exec "$python" -m moelpr "$command" "$@"
fi
if ! command -v "$command" >/dev/null; then
    echo "entrypoint.sh: error: there is no tool or command $command; list the tools with --help" >&2
    exit 2
fi
exec "${prepare[@]}" "$command" "$@"
