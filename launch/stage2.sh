#!/usr/bin/env bash
# Stage 2, review: train only the routers on a little replay text, with the LPR loss.
exec "$(dirname "$0")/python.sh" -m moelpr train stage2 "$@"
