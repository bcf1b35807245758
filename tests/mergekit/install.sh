#!/usr/bin/env bash
# Installs mergekit into a virtual environment of its own, which finds PyTorch and transformers in .venv.
# Does nothing if it is installed; exits with code 1 and a message if it is unavailable.
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/../.."
venv=.venv-mergekit

fail() {
    echo "install.sh: error: $1" >&2
    exit 1
}

if [ -x $venv/bin/mergekit-moe ]; then exit; fi
[ -x .venv/bin/python ] || fail ".venv is missing; run make venv first"
rm -rf $venv
.venv/bin/python -m venv $venv
packages='import sysconfig; print(sysconfig.get_path("purelib"))'
.venv/bin/python -c "$packages" >"$($venv/bin/python -c "$packages")/moelpr.pth"
if ! timeout 300 $venv/bin/python -m pip install --quiet mergekit==0.1.5; then
    rm -rf $venv
    fail "pip could not install mergekit (see above)"
fi
