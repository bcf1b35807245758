#!/usr/bin/env bash
# Stage 0, new tokens: train only the embedding and output rows of new tokens on expanded-language text.
#   launch/stage0.sh [--dry-run] [--nnodes N …] --recipe FILE --pretrained-checkpoint DIR --data-path PREFIX … --save DIR
# launch/stage0.sh --help lists the launcher's options; all other arguments go to the trainer.
exec "$(dirname "$0")/train.sh" stage0 "$@"
