#!/usr/bin/env bash
# Stage 2, review: train only the routers on a little replay text, with the LPR loss.
#   launch/stage2.sh [--dry-run] [--nnodes N …] --recipe FILE --pretrained-checkpoint DIR --data-path PREFIX … --save DIR
# launch/stage2.sh --help lists the launcher's options; all other arguments go to the trainer.
exec "$(dirname "$0")/train.sh" stage2 "$@"
