#!/usr/bin/env bash
# Make .venv-GROUP: the packages of requirements/GROUP.txt on top of those in .venv; do nothing if it is made. As root,
# install the programs of Debian that some groups need.
#
#   launch/extend_venv.sh GROUP
#
# Exits with code 1 and a message if packages or programs cannot be downloaded.
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/.."
PATH=$PATH:/usr/local/sbin:/usr/sbin
venv=.venv-$1 requirements=requirements/$1.txt

fail() {
    echo "extend_venv.sh: error: $1" >&2
    exit 1
}

debian() {
    if ((EUID != 0)); then fail "programs are missing; run this as root, or install $*"; fi
    command -v apt-get >/dev/null || fail "programs are missing and there is no apt-get; install what Debian has in $*"
    export DEBIAN_FRONTEND=noninteractive
    timeout 300 bash -c 'apt-get update -qq && apt-get install -y -qq --no-install-recommends "$@"' apt "$@" >/dev/null ||
        fail "apt-get could not install $* (see above)"
}

has() { type "$@" >/dev/null 2>&1; }

case $1 in
slurm) # 23.11 or later; the installation starts no service, the tests start their own
    if ((EUID != 0)); then fail "slurmd requires root; run the Slurm tests as root, for example in a container"; fi
    has slurmctld slurmd srun || debian slurmctld slurmd slurm-client
    ;;
browser) # the fonts cover every script of the demo's languages
    if ! has chromium || [ -z "$(fc-list :lang=zh)" ]; then
        debian chromium fonts-noto-core fonts-noto-cjk
    fi
    ;;
readers) has go || debian golang-go ;; # with whose templates Ollama's are written
esac
if [ ! -e "$requirements" ]; then exit; fi

if [ ! -x .venv/bin/python ]; then fail ".venv is missing; run make venv first"; fi
made_from="$(.venv/bin/python --version) $(sha256sum <"$requirements")"
if [ "$(cat "$venv/made_from" 2>/dev/null)" = "$made_from" ]; then exit; fi
rm -rf "$venv"
.venv/bin/python -m venv "$venv"
site_of() { "$1/bin/python" -c 'import sysconfig; print(sysconfig.get_path("purelib"))'; }
echo "import site; site.addsitedir('$(site_of .venv)')" >"$(site_of "$venv")/base.pth"
timeout 600 launch/fill_venv.sh "$venv" --quiet --require-hashes --no-deps --requirement "$requirements" || {
    (($? != 124)) || fail "$requirements took more than ten minutes to install; run the command again"
    fail "$requirements could not be installed (see above)"
}
echo "$made_from" >"$venv/made_from"
