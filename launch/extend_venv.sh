#!/usr/bin/env bash
# Make a virtual environment with further packages on top of those in .venv; do nothing if it is made.
#
#   launch/extend_venv.sh FOLDER PIP_ARGUMENT...
#
# Exits with code 1 and a message if the packages cannot be downloaded.
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/.."
venv=$1
shift

fail() {
    echo "extend_venv.sh: error: $1" >&2
    exit 1
}

if [ ! -x .venv/bin/python ]; then fail ".venv is missing; run make venv first"; fi
made_from="$(.venv/bin/python --version) $*"
if [ "$(cat "$venv/made_from" 2>/dev/null)" = "$made_from" ]; then exit; fi
rm -rf "$venv"
.venv/bin/python -m venv "$venv"
site_of() { "$1/bin/python" -c 'import sysconfig; print(sysconfig.get_path("purelib"))'; }
echo "import site; site.addsitedir('$(site_of .venv)')" >"$(site_of "$venv")/base.pth"
timeout 600 "$venv/bin/python" -m pip install --disable-pip-version-check --quiet "$@" || {
    (($? != 124)) || fail "pip took more than ten minutes to install $*; run the command again"
    fail "pip could not install $* (see above)"
}
echo "$made_from" >"$venv/made_from"
