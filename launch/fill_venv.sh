#!/usr/bin/env bash
# Install packages into a virtual environment by uv, which takes a fraction of pip's time, or, where uv cannot be had or
# fails, by pip, whose settings have the last word.
#
#   launch/fill_venv.sh FOLDER PIP_ARGUMENT...
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/.."
venv=$1 uv=.venv/bin/uv
shift
pip() { "$1/bin/python" -m pip --disable-pip-version-check "${@:2}"; }

if [ ! -x "$uv" ]; then
    pip .venv install --quiet --require-hashes --requirement <(sed -n '/^uv==/,/[^\\]$/p' requirements/dev.txt) || true
fi
if [ -x "$uv" ]; then
    # uv does not read pip's configuration: the index, certificates and so on of this site.
    settings=$(pip .venv config list)
    while read -r name variable; do
        value=$(sed -n "s/^[^=]*\.$name='\(.*\)'$/\1/p" <<<"$settings" | head -n 1)
        value=${value#\\n} # of several lines
        [ -z "$value" ] || export "$variable=${!variable:-${value//\\n/ }}"
    done <<<"index-url UV_DEFAULT_INDEX
extra-index-url UV_INDEX
trusted-host UV_INSECURE_HOST
timeout UV_HTTP_TIMEOUT
default-timeout UV_HTTP_TIMEOUT
cert SSL_CERT_FILE"
    export UV_INDEX_STRATEGY=${UV_INDEX_STRATEGY:-unsafe-best-match} # of all indexes, as pip; hashes decide
    if "$uv" pip install --python "$venv/bin/python" "$@"; then exit; fi
    echo "fill_venv.sh: uv has failed (see above); trying pip, which takes some minutes" >&2
fi
pip "$venv" install --quiet "$@"
