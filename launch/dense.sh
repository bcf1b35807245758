#!/usr/bin/env bash
# Dense model: train a base from scratch, or fine-tune all parameters for comparison.
#   launch/dense.sh [--dry-run] [--nnodes N …] --recipe FILE --pretrained-checkpoint DIR --data-path PREFIX … --save DIR
# launch/dense.sh --help lists the launcher's options; all other arguments go to the trainer.
exec "$(dirname "$0")/train.sh" dense "$@"
