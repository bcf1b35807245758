#!/usr/bin/env bash
# Installs what the tests on a real Slurm need from Debian or Ubuntu, as root; does nothing where it is already.
# Ends with code 1 and a sentence where it can't be had.
set -euo pipefail
PATH=$PATH:/usr/local/sbin:/usr/sbin
packages=(slurmctld slurmd slurm-client)

fail() {
    echo "install.sh: error: $1" >&2
    exit 1
}

if ((EUID != 0)); then fail "slurmd needs root; run the tests on Slurm as root, in a container for example"; fi
if command -v slurmctld slurmd sbatch srun >/dev/null; then exit; fi
command -v apt-get >/dev/null ||
    fail "slurmctld, slurmd and sbatch are missing and there is no apt-get; install Slurm 23.11 or later"
# Nothing is started on installation; the tests start their own.
export DEBIAN_FRONTEND=noninteractive
if ! timeout 300 bash -c 'apt-get update -qq && apt-get install -y -qq --no-install-recommends "$@"' apt "${packages[@]}" \
    >/dev/null; then
    fail "apt-get could not install ${packages[*]} (see above)"
fi
