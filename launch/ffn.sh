#!/usr/bin/env bash
# FFNs only: train the FFNs of a dense model, what MoE-LPR trains, but without experts, for comparison.
#   launch/ffn.sh [--dry-run] [--nnodes N …] --recipe FILE --pretrained-checkpoint DIR --data-path PREFIX … --save DIR
# launch/ffn.sh --help lists the launcher's options; all other arguments go to the trainer.
exec "$(dirname "$0")/train.sh" ffn "$@"
