#!/usr/bin/env bash
# Stage 1, post-pretrain: train new experts and routers on expanded-language text.
exec "$(dirname "$0")/python.sh" -m moelpr train stage1 "$@"
