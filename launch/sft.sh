#!/usr/bin/env bash
# Supervised fine-tuning, chat: train new experts and routers on conversations, with the LPR loss.
exec "$(dirname "$0")/python.sh" -m moelpr train sft "$@"
