#!/usr/bin/env bash
# Installs Debian or Ubuntu packages that tests need, as root; exits with code 1 and a message if they are unavailable.
set -euo pipefail

fail() {
    echo "install.sh: error: $1" >&2
    exit 1
}

if ((EUID != 0)); then fail "programs are missing; run this as root, or install $*"; fi
command -v apt-get >/dev/null || fail "programs are missing and there is no apt-get; install what Debian has in $*"
export DEBIAN_FRONTEND=noninteractive
timeout 300 bash -c 'apt-get update -qq && apt-get install -y -qq --no-install-recommends "$@"' apt "$@" >/dev/null ||
    fail "apt-get could not install $* (see above)"
