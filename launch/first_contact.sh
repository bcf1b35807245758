#!/usr/bin/env bash
# Check a GPU machine: tests, benchmarks and short runs of the trainer on all visible GPUs, in at most ten minutes.
#
#   launch/first_contact.sh [--output DIR] [--parts PART …] [--dry-run [--ranks N]]
#
# Needs neither a model nor text, prints a table, and writes it to DIR/log.md. --dry-run tries it on CPU ranks.
set -euo pipefail
root=$(cd "$(dirname "${BASH_SOURCE[0]}")/.." && pwd)

python=$root/.venv/bin/python
if [[ ! -x $python ]]; then
    python=python3 # a container or another environment with the packages of setup.py
fi
export PYTHONPATH=$root${PYTHONPATH:+:$PYTHONPATH}
exec "$python" -m benchmarks.first_contact "$@"
