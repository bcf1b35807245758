#!/usr/bin/env bash
# Try moelpr on a GPU machine that it has never run on: tests, benchmarks and short runs of the trainer on all visible
# GPUs, with random weights and text. Takes at most ten minutes, prints one table, and writes it to a file.
#
#   launch/first_contact.sh [--output DIR] [--dry-run [--ranks N]] …
#
# --dry-run tries the same on CPU ranks with tiny sizes. --help lists all options.
set -euo pipefail
root=$(cd "$(dirname "${BASH_SOURCE[0]}")/.." && pwd)

python=$root/.venv/bin/python
if [[ ! -x $python ]]; then
    python=python3 # a container or another environment with the packages of setup.py
fi
export PYTHONPATH=$root${PYTHONPATH:+:$PYTHONPATH}
exec "$python" -m benchmarks.first_contact "$@"
