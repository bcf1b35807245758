#!/usr/bin/env bash
# Makes .venv-mergekit, which finds PyTorch and transformers in .venv.
cd "$(dirname "${BASH_SOURCE[0]}")/../.." || exit 1
exec launch/extend_venv.sh .venv-mergekit mergekit==0.1.5
