#!/usr/bin/env bash
# A dense model: a base from scratch, or full fine-tuning for comparison.
#   launch/dense.sh [--dry-run] [--nnodes N …] --recipe FILE --pretrained-checkpoint DIR --data-path PREFIX … --save DIR
# The launcher's own words and variables (--nnodes, NNODES, …) are explained in launch/train.sh.
exec "$(dirname "$0")/train.sh" dense "$@"
