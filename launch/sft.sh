#!/usr/bin/env bash
# Supervised fine-tuning, chat: train new experts and routers on conversations, with the LPR loss.
#   launch/sft.sh [--dry-run] [--nnodes N …] --recipe FILE --pretrained-checkpoint DIR --data-path PREFIX … --save DIR
# launch/sft.sh --help lists the launcher's options; all other arguments go to the trainer.
exec "$(dirname "$0")/train.sh" sft "$@"
