#!/usr/bin/env bash
# Makes .venv-harness: lm-evaluation-harness.
cd "$(dirname "${BASH_SOURCE[0]}")/../.." || exit 1
exec launch/extend_venv.sh .venv-harness lm-eval==0.4.13
