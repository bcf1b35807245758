#!/usr/bin/env bash
# Installs what the browser tests need from Debian, as root; does nothing if it is installed.
if command -v chromium >/dev/null && command -v pdftoppm >/dev/null && [ -n "$(fc-list :lang=zh)" ]; then exit; fi
# The fonts cover every script of the demo's languages; poppler-utils turns printed pages into images.
exec "$(dirname "${BASH_SOURCE[0]}")/../support/install_debian.sh" \
    chromium fonts-noto-core fonts-noto-cjk poppler-utils
