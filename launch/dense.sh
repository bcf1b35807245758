#!/usr/bin/env bash
# Dense model: train a base from scratch, or fine-tune all parameters for comparison.
exec "$(dirname "$0")/python.sh" -m moelpr train dense "$@"
