#!/usr/bin/env bash
# Check a GPU machine: tests, benchmarks and short runs of the trainer on all visible GPUs, each with a time limit.
#
#   launch/first_contact.sh [--output DIR] [--parts PART …] [--dry-run [--ranks N]]
#
# Needs a clone of the repository, but neither a model nor text; prints a table, and writes it to DIR/log.md. --dry-run
# tries it on CPU ranks.
set -euo pipefail
root=$(cd "$(dirname "${BASH_SOURCE[0]}")/.." && pwd)
if [[ ! -d $root/benchmarks ]]; then
    if [[ ${1:-} == --help ]]; then exec sed -n '2,/^set/{/^set/d;s/^# \{0,1\}//p;}' "${BASH_SOURCE[0]}"; fi
    echo "first_contact.sh: error: there is no $root/benchmarks; run launch/first_contact.sh of a clone of the repository" >&2
    exit 2
fi

export PYTHONPATH=$root${PYTHONPATH:+:$PYTHONPATH}
exec "$root/launch/python.sh" -m benchmarks.first_contact "$@"
