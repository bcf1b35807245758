#!/usr/bin/env bash
# Create .venv with all packages, or update it; do nothing if it is up to date.
#
#   launch/make_venv.sh                 as called by `make test` and `make demo`
#   launch/make_venv.sh --find-python   only print the Python that .venv would be created with
#
# The first suitable Python on PATH is used; PYTHON=/path/to/python selects another.
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/.."

supported=(3.13 3.12) # as python_requires in setup.py, the preferred one first
stamp=.venv/.installed

fail() {
    echo "make_venv.sh: error: $2" >&2
    exit "$1"
}

# Print "fits" if .venv can be created with the Python $1, else the reason why not.
verdict() {
    # A version manager's shim may fail, or wait for input.
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

# Print the first suitable Python.
find_python() {
    local candidates candidate found="" answer
    if [ -n "${PYTHON:-}" ]; then
        candidates=$PYTHON
    else
        # Every match on PATH, not only the first of each name; except .venv, which may be about to be deleted.
        candidates=$(type -aP "${supported[@]/#/python}" python3 python)
    fi || true
    while read -r candidate && [ -n "$candidate" ]; do
        if [ -z "${PYTHON:-}" ] && [[ $candidate == "$PWD"/.venv/* ]]; then continue; fi
        answer=$(verdict "$candidate")
        if [ "$answer" = fits ]; then
            echo "$candidate"
            return
        fi
        found+="$candidate ${answer:-"doesn't run"}; "
    done <<<"$candidates"
    fail 2 "no suitable Python: expected $(printf "%s or " "${supported[@]}" | sed "s/ or $//") with venv and C headers, found ${found:-none on PATH; }install one \
(on Debian or Ubuntu for example python3.13, python3.13-venv and python3.13-dev) or set PYTHON=/path/to/python"
}

# Fail if this disk cannot hold a new .venv.
check_disk() {
    local needed=6 free
    free=$(($(df --block-size 1000000000 --output=avail . | tail -n 1)))
    if ((free < needed)); then
        fail 1 "a new .venv takes $needed GB of disk, and $PWD has $free GB free; free some space"
    fi
}

if [ "${1:-}" = --find-python ]; then
    find_python
    exit
fi

# One at a time: `make demo` and `make test` may run concurrently.
exec 9<.
flock 9

state=$(cat "$stamp" 2>/dev/null || true)
wanted=$({ pwd && cat setup.py requirements/dev.txt launch/make_venv.sh moelpr/data/csrc/*; } | sha256sum | cut -d' ' -f1)
base_of() { "$1" -c 'import sys; print(sys.version, sys.base_prefix)'; }

# Start over if an earlier run was interrupted, the Python is missing, or another one is requested.
if [ "$state" = unfinished ] || [ "$(verdict .venv/bin/python)" != fits ] ||
    { [ -n "${PYTHON:-}" ] && [ "$(base_of "$PYTHON")" != "$(base_of .venv/bin/python)" ]; }; then
    python=$(find_python)
    echo "creating .venv with $python"
    rm -rf .venv
    check_disk
    mkdir .venv
    echo unfinished >"$stamp"
    "$python" -m venv .venv
elif [ "$state" = "$wanted" ]; then
    exit
fi

echo unfinished >"$stamp"
echo "installing $(grep -c == requirements/dev.txt) packages (a new .venv downloads about 3 GB, takes 6 GB on disk and some minutes)"
# Some Pythons name the compiler that built them, which may not be installed.
if command -v gcc >/dev/null && command -v g++ >/dev/null; then export CC="${CC:-gcc}" CXX="${CXX:-g++}"; fi
# Without build isolation, so that the pinned setuptools and pybind11 build the extension.
if ! { launch/fill_venv.sh .venv --require-hashes --requirement requirements/dev.txt &&
    launch/fill_venv.sh .venv --quiet --no-deps --no-build-isolation --editable .; } 2>&1 | sed -E '/^( [-+~]| Downloaded|Downloading \S+ \([0-9.]{1,4}[KM]iB)/d'; then
    fail 1 "the installation failed (see above); rerun the command to start over"
fi
echo "$wanted" >"$stamp"
echo ".venv is ready"
