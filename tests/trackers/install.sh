#!/usr/bin/env bash
# Makes .venv-trackers: the clients of MLflow and Weights & Biases.
cd "$(dirname "${BASH_SOURCE[0]}")/../.." || exit 1
exec launch/extend_venv.sh .venv-trackers mlflow-skinny==3.17.2 wandb==0.31.0
