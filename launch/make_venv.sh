#!/usr/bin/env bash
# Makes .venv with everything installed, or brings it up to date; does nothing where it is already.
#
#   launch/make_venv.sh                 as `make test` and `make demo` call it
#   launch/make_venv.sh --find-python   only print the Python that .venv would be made with
#
# The Python is the first on PATH that fits; PYTHON=/path/to/python names another.
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/.."

supported=(3.13 3.12) # as python_requires in setup.py; the preferred one first
stamp=.venv/.installed

fail() {
    echo "make_venv.sh: error: $2" >&2
    exit "$1"
}

# Prints "fits" if the Python $1 can carry .venv, else what keeps it from that.
verdict() {
    # A version manager's shim may be there and not run, or wait for an answer.
    timeout --kill-after=5 10 "$1" - "${supported[@]}" <<'PYTHON' 2>/dev/null || echo "doesn't run"
import os, sys, sysconfig
version = "%d.%d" % sys.version_info[:2]
if version not in sys.argv[1:]:
    print("is Python " + version)
elif sys.implementation.name != "cpython" or sysconfig.get_config_var("Py_GIL_DISABLED"):
    print("is not the standard CPython")
elif not os.path.exists(os.path.join(sysconfig.get_path("include"), "Python.h")):
    print("lacks its C headers, package python%s-dev" % version)
else:
    try:
        import ensurepip, venv
        print("fits")
    except ImportError:
        print("lacks venv or ensurepip, package python%s-venv" % version)
PYTHON
}

# Prints the first Python that fits.
find_python() {
    local candidates candidate found="" answer
    if [ -n "${PYTHON:-}" ]; then
        candidates=$PYTHON
    else
        # Every match on PATH, not only the first of a name. .venv itself doesn't count: it may be about to go.
        candidates=$(type -aP "${supported[@]/#/python}" python3 python | grep -v "^$PWD/\.venv/")
    fi || true
    while read -r candidate && [ -n "$candidate" ]; do
        answer=$(verdict "$candidate")
        if [ "$answer" = fits ]; then
            echo "$candidate"
            return
        fi
        found+="$candidate ${answer:-"doesn't run"}; "
    done <<<"$candidates"
    fail 2 "no Python fits: wanted $(printf "%s or " "${supported[@]}" | sed "s/ or $//") with venv and C headers, found ${found:-none on PATH; }install one \
(on Debian or Ubuntu for example python3.13, python3.13-venv and python3.13-dev) or set PYTHON=/path/to/python"
}

if [ "${1:-}" = --find-python ]; then
    find_python
    exit
fi

# One at a time: `make demo` and `make test` may be started together.
exec 9<.
flock 9

state=$(cat "$stamp" 2>/dev/null || true)
wanted=$({ pwd && cat setup.py constraints.txt launch/make_venv.sh moelpr/data/csrc/*; } | sha256sum | cut -d' ' -f1)
base_of() { "$1" -c 'import sys; print(sys.version, sys.base_prefix)'; }

# Start afresh where an earlier run was cut off, the Python is gone, or another one is asked for.
if [ "$state" = unfinished ] || [ "$(verdict .venv/bin/python)" != fits ] ||
    { [ -n "${PYTHON:-}" ] && [ "$(base_of "$PYTHON")" != "$(base_of .venv/bin/python)" ]; }; then
    python=$(find_python)
    echo "making .venv with $python"
    rm -rf .venv
    mkdir .venv
    echo unfinished >"$stamp"
    "$python" -m venv .venv
elif [ "$state" = "$wanted" ]; then
    exit
fi

echo unfinished >"$stamp"
echo "installing $(wc -l <constraints.txt) packages (about 3 GB to download and 6 GB on disk when new; takes minutes); the large ones:"
# Some Pythons name the compiler that built them, which may not be here.
if command -v gcc >/dev/null && command -v g++ >/dev/null; then export CC="${CC:-gcc}" CXX="${CXX:-g++}"; fi
install() { .venv/bin/python -m pip install --disable-pip-version-check --constraint constraints.txt "$@"; }
# Without build isolation, so that the pinned setuptools and pybind11 build the extension.
if ! { install --quiet setuptools pybind11 && install --no-build-isolation --editable '.[dev]'; } |
    sed -unE -e 's/^ *(Downloading|Using cached) (\S+) \(([0-9]{3,}(\.[0-9]+)? MB|.* GB)\)$/  \2 (\3)/p' \
        -e 's/^Installing collected packages.*/  unpacking/p'; then
    fail 1 "the installation stopped (see above); run the command again, it starts afresh"
fi
echo "$wanted" >"$stamp"
echo ".venv is ready"
