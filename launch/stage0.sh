#!/usr/bin/env bash
# Stage 0, new tokens: train only the embedding and output rows of new tokens on expanded-language text.
exec "$(dirname "$0")/python.sh" -m moelpr train stage0 "$@"
