#!/usr/bin/env bash
# Makes .venv-real-model: peft, lm-evaluation-harness and the GGUF reader, on top of the packages in .venv. Does nothing
# if it is made. Exits with code 1 and a message if the packages cannot be downloaded.
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/../.." || exit 1
packages=(accelerate==1.15.0 gguf==0.19.0 lm-eval==0.4.13 peft==0.21.2)
venv=.venv-real-model
made_from="$(.venv/bin/python --version) ${packages[*]}"

if [ "$(cat "$venv/made_from" 2>/dev/null)" = "$made_from" ]; then exit; fi
rm -rf "$venv"
.venv/bin/python -m venv "$venv"
site_of() { "$1/bin/python" -c 'import sysconfig; print(sysconfig.get_path("purelib"))'; }
echo "import site; site.addsitedir('$(site_of .venv)')" >"$(site_of "$venv")/base.pth"
if ! timeout 600 "$venv/bin/python" -m pip install --quiet "${packages[@]}"; then
    echo "install.sh: error: pip could not install ${packages[*]} (see above)" >&2
    exit 1
fi
echo "$made_from" >"$venv/made_from"
