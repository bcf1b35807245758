#!/usr/bin/env bash
# Stage 1, post-pretraining: trains new experts and routers on expanded-language text.
#   launch/stage1.sh [--dry-run] [--nnodes N …] --recipe FILE --pretrained-checkpoint DIR --data-path PREFIX … --save DIR
# The launcher's own words and variables (--nnodes, NNODES, …) are explained in launch/train.sh.
exec "$(dirname "$0")/train.sh" stage1 "$@"
