#!/usr/bin/env bash
# Stage 2, review: trains the routers alone on a little replay text, with the language-priors loss.
#   launch/stage2.sh [--dry-run] [--nnodes N …] --recipe FILE --pretrained-checkpoint DIR --data-path PREFIX … --save DIR
# The launcher's own words and variables (--nnodes, NNODES, …) are explained in launch/train.sh.
exec "$(dirname "$0")/train.sh" stage2 "$@"
