#!/usr/bin/env bash
# Makes .venv-real-model: peft, lm-evaluation-harness and the GGUF reader.
cd "$(dirname "${BASH_SOURCE[0]}")/../.." || exit 1
exec launch/extend_venv.sh .venv-real-model accelerate==1.15.0 gguf==0.19.0 lm-eval==0.4.13 peft==0.21.2
