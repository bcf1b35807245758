#!/usr/bin/env bash
# Makes .venv-trl, which finds PyTorch and transformers in .venv.
cd "$(dirname "${BASH_SOURCE[0]}")/../.." || exit 1
exec launch/extend_venv.sh .venv-trl trl==1.16.0
