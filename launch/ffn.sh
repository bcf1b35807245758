#!/usr/bin/env bash
# FFNs only: train the FFNs of a dense model, what MoE-LPR trains, but without experts, for comparison.
exec "$(dirname "$0")/python.sh" -m moelpr train ffn "$@"
