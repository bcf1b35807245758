#!/usr/bin/env bash
# Installs a Slurm from Debian for the tests on a real one, as root; does nothing if it is installed.
PATH=$PATH:/usr/local/sbin:/usr/sbin
if ((EUID != 0)); then
    echo "install.sh: error: slurmd requires root; run the Slurm tests as root, for example in a container" >&2
    exit 1
fi
if command -v slurmctld >/dev/null && command -v slurmd >/dev/null && command -v srun >/dev/null; then exit; fi
# The tests require Slurm 23.11 or later. The installation starts no service; they start their own.
exec "$(dirname "${BASH_SOURCE[0]}")/../support/install_debian.sh" slurmctld slurmd slurm-client
