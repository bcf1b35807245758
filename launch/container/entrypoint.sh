#!/usr/bin/env bash
# The container's entry point: the first word names a tool, the others are the tool's; any other command runs as it is.
#   docker run … moelpr stage1 --recipe /opt/moelpr/launch/recipes/paper-stage1.yaml …
#   docker run … moelpr preprocess_data --help
#   docker run … moelpr bash
set -euo pipefail
root=$(cd "$(dirname "${BASH_SOURCE[0]}")/../.." && pwd)
python=$root/.venv/bin/python
[[ -x $python ]] || python=python3
packages=$("$python" -c 'import os, moelpr; print(os.path.dirname(moelpr.__path__[0]))')

# Files that are a tool: what can be run, by its own name or, as __main__.py, its folder's.
tools=("$root"/launch/{dense,stage1,stage2}.sh)
mapfile -O "${#tools[@]}" -t tools < <(grep -lx 'if __name__ == "__main__":' \
    "$packages"/{data_tools,checkpoint_convert,moelpr}/*.py "$packages"/moelpr/*/__main__.py)
name_of() {
    local file=${1%/__main__.py}
    file=${file##*/}
    echo "${file%.*}"
}

wanted=${1:---help}
if [[ $wanted == --help || $wanted == -h ]]; then
    echo "A tool of moelpr with its arguments (each has --help), or any other command:"
    for tool in "${tools[@]}"; do
        # What a file says of itself first: a docstring, or the comment under the shebang.
        about=$(sed -n -e 's/^# //p' -e 's/^"""//p' "$tool" | head -n 1)
        printf '  %-18s %s\n' "$(name_of "$tool")" "${about%\"\"\"}"
    done
    exit
fi
shift || true

# NVIDIA's own entry point looks at the driver, and talks: for training, and for commands we don't know.
prepare=()
[[ ! -x /opt/nvidia/nvidia_entrypoint.sh ]] || prepare=(/opt/nvidia/nvidia_entrypoint.sh)
for tool in "${tools[@]}"; do
    [[ $(name_of "$tool") == "${wanted//-/_}" ]] || continue
    [[ $tool != *.sh ]] || exec "${prepare[@]}" "$tool" "$@"
    module=${tool#"$packages/"}
    module=${module%.py}
    module=${module%/__main__}
    exec "$python" -m "${module//\//.}" "$@"
done
if ! command -v "$wanted" >/dev/null; then
    echo "entrypoint.sh: error: there is no tool or command $wanted; --help lists the tools" >&2
    exit 2
fi
exec "${prepare[@]}" "$wanted" "$@"
