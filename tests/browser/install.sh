#!/usr/bin/env bash
# Installs what the browser tests need from Debian, as root; does nothing if it is installed.
# Exits with code 1 and a message if it is unavailable.
set -euo pipefail
# The fonts cover every script of the demo's languages; poppler-utils turns printed pages into images.
packages=(chromium fonts-noto-core fonts-noto-cjk poppler-utils)

fail() {
    echo "install.sh: error: $1" >&2
    exit 1
}
is_installed() { # `command -v` with several names succeeds if it finds one
    for program; do command -v "$program" >/dev/null || return 1; done
}

if is_installed chromium pdftoppm && [ -n "$(fc-list :lang=zh)" ]; then exit; fi
if ((EUID != 0)); then fail "chromium, pdftoppm or fonts are missing; run this as root, or install ${packages[*]}"; fi
command -v apt-get >/dev/null ||
    fail "chromium, pdftoppm or fonts are missing and there is no apt-get; install Chromium, poppler-utils and Noto fonts"
export DEBIAN_FRONTEND=noninteractive
if ! timeout 300 bash -c 'apt-get update -qq && apt-get install -y -qq --no-install-recommends "$@"' apt "${packages[@]}" \
    >/dev/null; then
    fail "apt-get could not install ${packages[*]} (see above)"
fi
