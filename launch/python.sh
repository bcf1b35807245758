#!/usr/bin/env bash
# Become moelpr's Python: MOELPR_PYTHON, or that of the repository's .venv, or, in an installed package, of its
# environment; in a container or another environment with the packages of setup.py, the one on PATH.
root=$(cd "$(dirname "${BASH_SOURCE[0]}")/.." && pwd)
own=$root/.venv/bin/python
if [[ -f $root/__init__.py ]]; then own=$root/../../../../bin/python3; fi
for python in "${MOELPR_PYTHON:-}" "$own"; do
    if [[ -x $python ]]; then exec "$python" -P "$@"; fi
done
if [[ ! -f $root/__init__.py ]]; then export PYTHONPATH=$root${PYTHONPATH:+:$PYTHONPATH}; fi
exec python3 -P "$@"
