#!/usr/bin/env bash
# Build the Dockerfile on a machine without a GPU, docker or space for NVIDIA's image. The base is a small Debian image
# under the name of the real base, with stub packages for torch, Transformer Engine and Apex. Every COPY, install step
# and entry point runs; then the tools run in the image, with the torch of .venv mounted into it.
#   sudo launch/container/build_on_stand_in.sh [WORK_FOLDER]      (default: /tmp/moelpr-container)
# Requires Debian's buildah, netavark and mmdebstrap, a package index, and .venv (make venv). Takes minutes.
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/../.."

fail() {
    echo "build_on_stand_in.sh: error: $1" >&2
    exit "${2:-1}"
}
for command in buildah mmdebstrap; do
    command -v "$command" >/dev/null || fail "$command is not installed; run apt-get install buildah netavark mmdebstrap" 2
done
((EUID == 0)) || fail "building with chroot requires root; run this with sudo" 2
[[ -x .venv/bin/python ]] || fail ".venv is missing; run make venv first" 2

work=${1:-/tmp/moelpr-container}
base=$(sed -n 's/^ARG BASE=//p' Dockerfile)
image=localhost/moelpr:stand-in
host_site=$(.venv/bin/python -c 'import sysconfig; print(sysconfig.get_path("purelib"))')
mkdir -p "$work"
# A separate store, in which the real base's name refers to the stub.
store=(--root "$work/store" --runroot "$work/run" --storage-driver overlay)
b() { # the store's options precede the command
    buildah "${store[@]}" "$@"
}
# This machine's limits; buildah requests a million open files.
limits=(--ulimit "nofile=$(ulimit -Hn)" --ulimit "nproc=$(ulimit -Hu)")
section() { printf '\n== %s\n' "$1"; }

if ! b inspect --type image "$base" >/dev/null 2>&1; then
    section "stub of $base"
    tar=$work/base.tar
    [[ -s $tar ]] || mmdebstrap --quiet --variant=minbase --include=ca-certificates,g++,python3-dev,python3-pip,python3-venv \
        "$(sed -n 's/^VERSION_CODENAME=//p' /etc/os-release)" "$tar"
    container=$(b from scratch)
    b add --quiet "$container" "$tar" /
    rootfs=$(b mount "$container")
    # The certificates with which this machine reaches the package index.
    cp /etc/ssl/certs/ca-certificates.crt "$rootfs/etc/ssl/certs/"
    # Packages that only pip sees. Our packages include torch's dependencies.
    site=$(chroot "$rootfs" python3 -c 'import site; print(site.getsitepackages()[0])')
    for package in torch==2.13.0a0+stand.in triton==3.7.0 transformer_engine==2.16.0 apex==0.1; do
        info=$rootfs$site/${package/==/-}.dist-info
        mkdir -p "$info"
        printf 'Metadata-Version: 2.1\nName: %s\nVersion: %s\n' "${package%==*}" "${package#*==}" >"$info/METADATA"
        touch "$info/RECORD"
    done
    torch_info=$rootfs$site/torch-2.13.0a0+stand.in.dist-info
    printf 'Requires-Dist: %s\n' filelock fsspec jinja2 networkx sympy typing-extensions >>"$torch_info/METADATA"
    cp "$host_site"/torch-*.dist-info/entry_points.txt "$torch_info/" # torch finds gloo through these
    # The real base pins its packages for every pip install, and its entry point prints a banner.
    mkdir -p "$rootfs/etc/pip" "$rootfs/opt/nvidia"
    echo 'setuptools==70.0.0' >"$rootfs/etc/pip/constraint.txt"
    printf '#!/bin/bash\necho "stub of the NVIDIA entry point"\nexec "$@"\n' >"$rootfs/opt/nvidia/nvidia_entrypoint.sh"
    chmod +x "$rootfs/opt/nvidia/nvidia_entrypoint.sh"
    b umount "$container" >/dev/null
    b config --env PIP_CONSTRAINT=/etc/pip/constraint.txt --env PIP_CERT=/etc/ssl/certs/ca-certificates.crt \
        --env PIP_BREAK_SYSTEM_PACKAGES=1 "$container"
    b commit --quiet --rm "$container" "$base" >/dev/null
fi

section "build"
b build --isolation chroot --network host "${limits[@]}" --pull=never --layers --tag "$image" .
b images

container=$(b from --pull=never "${limits[@]}" "$image")
trap 'b rm "$container" >/dev/null' EXIT
mounts=()
for package in torch torchgen functorch nvidia triton; do
    [[ ! -d $host_site/$package ]] ||
        mounts+=(--volume "$(realpath "$host_site/$package"):/usr/local/lib/python3.13/dist-packages/$package:ro")
done
# Run arguments through the image's entry point, as docker run does; `options` are the options of that command.
options=()
run() {
    b run --isolation chroot --network host "${mounts[@]}" "${options[@]}" "$container" \
        /opt/moelpr/launch/container/entrypoint.sh "$@"
}
# expect TEXT COMMAND…: fail unless the command's output contains the text.
expect() {
    local expected=$1 output
    shift
    output=$("$@" 2>&1) || true
    grep -qF -- "$expected" <<<"$output" || fail "expected '$expected' from: ${*:2}; got: $output"
    echo "ok: ${*} -> $expected"
}

section "the image"
expect '"10001"' b inspect --type image --format '{{printf "%q" .OCIv1.Config.User}}' "$image"
expect 10001 run id -u
expect 2.13.0a0+stand.in run /opt/moelpr/.venv/bin/python -c 'import importlib.metadata as m; print(m.version("torch"))'
expect '(no torch)' run bash -c 'cd /opt/moelpr/.venv/lib/python3*/site-packages; ls -d torch* nvidia* 2>/dev/null || echo "(no torch)"'
expect "$(sed -n 's/^transformers==//p' constraints.txt)" run /opt/moelpr/.venv/bin/python -c \
    'import importlib.metadata as m; print(m.version("transformers"))'

options=(--user 1234:1234)
# shellcheck disable=SC2016  # the container's variables
expect '1234 moelpr /work' run bash -c 'touch ~/file /work/file && echo "$(id -u) $USER $PWD"'
options=()

section "the tools"
expect 'moelpr 0' run bash -c 'cd / && moelpr --version'
for package in lm-eval wandb gigatoken py3langid; do
    expect "$package ok" run /opt/moelpr/.venv/bin/python -c \
        "import importlib.metadata as m; print('$package', 'ok' if m.version('$package') else '')"
done
expect 'preprocess ' run --help
for tool in layouts check compare chat track; do
    expect 'usage:' run "$tool" --help
done
expect 'there is no tool or command stage3' run stage3
expect '/opt/moelpr/.venv/bin/python -m moelpr.torchrun --standalone' run train stage1 --dry-run
expect 'stub of the NVIDIA entry point' run train stage1 --dry-run
expect 'stage1.yaml' run ls /opt/moelpr/launch/recipes

section "first contact"
run first_contact --dry-run --ranks 1 --output /tmp/first-contact | grep -F 'tests/gpu ran'

section "a model, a corpus and two steps of stage 1 in the image"
run bash -eu -c '
cd /tmp && rm -rf trial && mkdir -p trial/moelpr && cd trial
echo "raise SystemExit(\"a package of the current folder\")" >moelpr/__init__.py
e=/opt/moelpr/launch/container/entrypoint.sh python=/opt/moelpr/.venv/bin/python
$python - <<PYTHON
import json, string
from tokenizers import Tokenizer, models, pre_tokenizers
from transformers import PreTrainedTokenizerFast, Qwen2Config, Qwen2ForCausalLM
words = {c: i for i, c in enumerate(string.printable)} | {"<end>": 100}
tokenizer = Tokenizer(models.WordLevel(words, unk_token="<end>"))
tokenizer.pre_tokenizer = pre_tokenizers.Split("", "isolated")
PreTrainedTokenizerFast(tokenizer_object=tokenizer, eos_token="<end>", unk_token="<end>").save_pretrained("hf")
Qwen2ForCausalLM(Qwen2Config(vocab_size=128, hidden_size=32, intermediate_size=48, num_hidden_layers=2,
    num_attention_heads=4, num_key_value_heads=2, max_position_embeddings=64, eos_token_id=100)).save_pretrained("hf")
with open("text.jsonl", "w") as file:
    for i in range(200):
        file.write(json.dumps({"text": f"document {i} of the trial, in the image"}) + "\n")
PYTHON
$e data preprocess --input text.jsonl --language expanded --output-prefix corpus --tokenizer-type HuggingFaceTokenizer \
    --tokenizer-model hf --append-eod
$e model convert --hf-path hf --save upcycled --num-new-experts 2
$e train stage1 --recipe paper-stage1 --nproc-per-node 2 --pretrained-checkpoint upcycled --data-path corpus_text_document --save run \
    --micro-batch-size 2 --global-batch-size 4 --seq-length 32 --lr 1e-3 --train-iters 2 --log-interval 1 | tail -n 2
$e model export --load run --save export
ls export/config.json
'
section "done"
