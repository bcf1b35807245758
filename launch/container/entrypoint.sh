#!/usr/bin/env bash
# Entry point of the container: run a tool by its name, or any other command.
#   docker run … moelpr stage1 --recipe /opt/moelpr/launch/recipes/paper-stage1.yaml …
#   docker run … moelpr preprocess_data --help
#   docker run … moelpr bash
set -euo pipefail
root=$(cd "$(dirname "${BASH_SOURCE[0]}")/../.." && pwd)
python=$root/.venv/bin/python
[[ -x $python ]] || python=python3
packages=$("$python" -c 'import os, moelpr; print(os.path.dirname(moelpr.__path__[0]))')

# The files that are tools, named after themselves or, for __main__.py, after their folder.
tools=("$root"/launch/{dense,first_contact,stage0,stage1,stage2}.sh)
mapfile -O "${#tools[@]}" -t tools < <(grep -lx 'if __name__ == "__main__":' \
    "$packages"/{data_tools,checkpoint_convert,moelpr}/*.py "$packages"/moelpr/*/__main__.py)
name_of() {
    local file=${1%/__main__.py}
    file=${file##*/}
    echo "${file%.*}"
}

command=${1:---help}
if [[ $command == --help || $command == -h ]]; then
    echo "Pass a tool and its arguments (each tool has --help), or any other command:"
    for tool in "${tools[@]}"; do
        # The first line of the docstring, or of the comment below the shebang.
        about=$(sed -n -e 's/^# //p' -e 's/^"""//p' "$tool" | head -n 1)
        printf '  %-18s %s\n' "$(name_of "$tool")" "${about%\"\"\"}"
    done
    exit
fi
shift || true

# NVIDIA's entry point checks the driver and prints a banner: only for training and unknown commands.
prepare=()
[[ ! -x /opt/nvidia/nvidia_entrypoint.sh ]] || prepare=(/opt/nvidia/nvidia_entrypoint.sh)
for tool in "${tools[@]}"; do
    [[ $(name_of "$tool") == "${command//-/_}" ]] || continue
    [[ $tool != *.sh ]] || exec "${prepare[@]}" "$tool" "$@"
    module=${tool#"$packages/"}
    module=${module%.py}
    module=${module%/__main__}
    exec "$python" -m "${module//\//.}" "$@"
done
if ! command -v "$command" >/dev/null; then
    echo "entrypoint.sh: error: there is no tool or command $command; list the tools with --help" >&2
    exit 2
fi
exec "${prepare[@]}" "$command" "$@"
