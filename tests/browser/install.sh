#!/usr/bin/env bash
# Installs what the browser tests need: from Debian, as root, a browser; into .venv-chat, the page of `moelpr chat` and
# what drives the browser. Does nothing if it is installed.
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/../.."
if ! command -v chromium >/dev/null || ! command -v pdftoppm >/dev/null || [ -z "$(fc-list :lang=zh)" ]; then
    # The fonts cover every script of the demo's languages; poppler-utils turns printed pages into images.
    tests/support/install_debian.sh chromium fonts-noto-core fonts-noto-cjk poppler-utils
fi
exec launch/extend_venv.sh .venv-chat gradio==6.31.0 playwright==1.65.2
