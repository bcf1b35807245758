#!/usr/bin/env bash
# Install the Debian or Ubuntu packages for the tests on a real Slurm, as root; do nothing if they are installed.
# Exit with code 1 and a message if they are unavailable.
set -euo pipefail
PATH=$PATH:/usr/local/sbin:/usr/sbin
packages=(slurmctld slurmd slurm-client)

fail() {
    echo "install.sh: error: $1" >&2
    exit 1
}
is_installed() { # `command -v` with several names succeeds if it finds one
    for program; do command -v "$program" >/dev/null || return 1; done
}

if ((EUID != 0)); then fail "slurmd requires root; run the Slurm tests as root, for example in a container"; fi
if is_installed slurmctld slurmd sbatch srun; then exit; fi
command -v apt-get >/dev/null ||
    fail "slurmctld, slurmd and sbatch are missing and apt-get is not available; install Slurm 23.11 or later"
# The installation starts no service; the tests start their own.
export DEBIAN_FRONTEND=noninteractive
if ! timeout 300 bash -c 'apt-get update -qq && apt-get install -y -qq --no-install-recommends "$@"' apt "${packages[@]}" \
    >/dev/null; then
    fail "apt-get could not install ${packages[*]} (see above)"
fi
