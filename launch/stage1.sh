#!/usr/bin/env bash
# Stage 1, post-pretrain: train new experts and routers on expanded-language text.
#   launch/stage1.sh [--dry-run] [--nnodes N …] --recipe FILE --pretrained-checkpoint DIR --data-path PREFIX … --save DIR
# launch/stage1.sh --help lists the launcher's options; all other arguments go to the trainer.
exec "$(dirname "$0")/train.sh" stage1 "$@"
