"""Speed and memory of preprocessing. The limits, in one run on one corpus:

- with Hugging Face's tokenizers, JSON and writing included, at most 1.25 times the time of a bare `encode_batch_fast`;
- with gigatoken at least 8 times as fast as with Hugging Face's tokenizers;
- at most 1 GiB of memory in all processes together, the same for a corpus ten times as large.

    python -m benchmarks.preprocess [--megabytes 200] [--work DIR] [--json FILE]

The corpus is the demo's, repeated with variations so that no library benefits from a cache: lines in random order, and
one word in twenty replaced by a new one. The tokenizer is a byte-level BPE with 32,000 tokens, trained on the demo's
text. Contenders take turns; the fastest round counts. CPU time is reported too, which other processes on the machine
disturb less. Memory is the sum of the processes' proportional set sizes (PSS), sampled ten times a second.
"""

import argparse
import contextlib
import json
import math
import os
import random
import resource
import shlex
import shutil
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import psutil

from benchmarks.common import ROOT, argument_parser, environment, working_folder, write_json
from benchmarks.timing import Turns

LIMITS = {"huggingface_to_bare": 1.25, "gigatoken_to_huggingface": 8.0, "peak_gib": 1.0}
RATIOS = {"huggingface_to_bare": ("huggingface", "bare"), "gigatoken_to_huggingface": ("huggingface", "gigatoken")}
_LETTERS = (b"aeioubdfgklmnprstvz" * 14)[:256]  # for any byte
_NEW_WORD_EVERY = 20


def main() -> None:
    parser = argument_parser(__doc__, rounds=2)
    parser.add_argument("--megabytes", type=int, default=200, help="size of the corpus, in MB")
    parser.add_argument("--large", type=int, default=10, help="size of the larger corpus, in times --megabytes")
    parser.add_argument("--workers", type=int, default=len(os.sched_getaffinity(0)), help="number of worker processes")
    parser.add_argument("--work", type=Path, help="folder for corpora, which is kept (default: a temporary folder)")
    parser.add_argument("--cache", type=Path, help="folder with the demo's wheel (see examples/demo_corpus.py)")
    args = parser.parse_args()
    with working_folder(args.work) as work:
        result = measure(args, work)
    print(json.dumps(result, indent=2))
    write_json(result, args.json)


def measure(args: argparse.Namespace, work: Path) -> dict[str, Any]:
    """Make missing corpora, and measure all contenders."""
    tokenizer, texts = demo(work, args.cache)
    sizes = (args.megabytes, args.megabytes * args.large)
    corpus, large = (repeated(texts, work / f"{size}.jsonl", size) for size in sizes)
    out = work / "out"

    def ours(file: Path, backend: str) -> list[str]:
        fixed = f"--language expanded --append-eod --tokenizer-type HuggingFaceTokenizer --log-interval {1 << 40}"
        words = ["--input", file, "--output-prefix", out / backend, "--tokenizer-model", tokenizer]
        words += ["--tokenizer-backend", backend, "--workers", args.workers, *fixed.split()]
        return [sys.executable, "-m", "moelpr", "data", "preprocess", *map(str, words)]

    bare = ROOT / "benchmarks/baselines/encode_batch.py"
    commands = {
        "bare": [sys.executable, str(bare), str(tokenizer / "tokenizer.json"), str(corpus)],
        "huggingface": ours(corpus, "reference"),
        "gigatoken": ours(corpus, "gigatoken"),
    }
    names, cpu = {name: name for name in commands}, dict.fromkeys(commands, math.inf)
    commands["gigatoken_large"] = ours(large, "gigatoken")
    peaks = dict.fromkeys(commands, 0.0)

    def run_one(name: str) -> float:
        out.mkdir()
        wall_s, cpu_s, peak_bytes, printed = run(commands[name])
        shutil.rmtree(out)
        peaks[name] = max(peaks[name], peak_bytes / 2**30)
        if name == "bare":
            wall_s, cpu_s = map(float, printed.split())
        cpu[name] = min(cpu.get(name, math.inf), cpu_s)
        return wall_s

    shutil.rmtree(out, ignore_errors=True)
    load = os.getloadavg()[0]
    wall = {name: min(seconds) for name, seconds in Turns(args.rounds).take(names, run_one).items()}
    run_one("gigatoken_large")
    megabytes = corpus.stat().st_size / 1e6
    result: dict[str, Any] = {
        "megabytes": round(megabytes, 1),
        "workers": args.workers,
        "load_before": round(load, 2),
        "seconds": {name: round(seconds, 2) for name, seconds in wall.items()},
        "megabytes_per_s": {name: round(megabytes / seconds, 1) for name, seconds in wall.items()},
        "cpu_seconds": {name: round(seconds, 2) for name, seconds in cpu.items() if name in wall},
        "peak_gib": {name: round(peak, 3) for name, peak in peaks.items() if name != "bare"},
        "wanted": LIMITS,
    }
    for ratio, (slower, faster) in RATIOS.items():
        result[ratio] = round(wall[slower] / wall[faster], 3)
        result[f"{ratio}_cpu"] = round(cpu[slower] / cpu[faster], 3)
    return result


def run(command: list[str]) -> tuple[float, float, int, str]:
    """Wall and CPU time in seconds, peak memory of all processes together in bytes, and standard output."""
    before = resource.getrusage(resource.RUSAGE_CHILDREN)
    started = time.perf_counter()
    with tempfile.TemporaryFile("w+") as output:
        process = subprocess.Popen(command, stdout=output, env=environment())
        peak = 0
        while process.poll() is None:
            peak = max(peak, proportional_bytes(process.pid))
            time.sleep(0.1)
        seconds = time.perf_counter() - started
        output.seek(0)
        printed = output.read()
    if process.returncode:
        sys.exit(f"{shlex.join(command)} failed with code {process.returncode}")
    after = resource.getrusage(resource.RUSAGE_CHILDREN)
    return seconds, after.ru_utime + after.ru_stime - before.ru_utime - before.ru_stime, peak, printed


def proportional_bytes(pid: int) -> int:
    """Proportional set size of a process and its descendants; those that have ended count as 0."""
    total = 0
    with contextlib.suppress(psutil.Error):
        parent = psutil.Process(pid)
        for process in [parent, *parent.children(recursive=True)]:
            with contextlib.suppress(psutil.Error):
                total += process.memory_full_info().pss
    return total


def demo(work: Path, cache: Path | None) -> tuple[Path, list[str]]:
    """A tokenizer of the demo's text, and the text."""
    corpus, tokenizer = work / "demo", work / "tokenizer"
    if not corpus.exists():
        words = ["-m", "examples.demo_corpus", "--output", str(corpus), *(["--cache", str(cache)] if cache else [])]
        subprocess.run([sys.executable, *words], env=environment(), check=True, stdout=subprocess.DEVNULL)
    lines = (line for path in sorted(corpus.glob("train.*.jsonl")) for line in path.read_text("utf-8").splitlines())
    texts = [json.loads(line)["text"] for line in lines]
    if not tokenizer.exists():
        from transformers import Qwen2Tokenizer

        Qwen2Tokenizer().train_new_from_iterator(texts, 32_000, show_progress=False).save_pretrained(tokenizer)
    return tokenizer, texts


def repeated(texts: list[str], path: Path, megabytes: int) -> Path:
    """Write varied copies of the texts until the file has its size; an existing file is reused."""
    if not path.exists():
        unfinished = path.with_suffix(".unfinished")
        with open(unfinished, "w", encoding="utf-8") as file:
            for text in varied(texts, random.Random(megabytes)):
                file.write(json.dumps({"text": text}, ensure_ascii=False) + "\n")
                if file.tell() >= megabytes * 1_000_000:
                    break
        unfinished.rename(path)
    return path


def varied(texts: list[str], rng: random.Random) -> Iterator[str]:
    """Endless documents: lines shuffled, and about every twentieth word a new one."""
    while True:
        for text in rng.sample(texts, len(texts)):
            lines = text.split("\n")
            rng.shuffle(lines)
            words = "\n".join(lines).split(" ")
            for index in range(rng.randrange(_NEW_WORD_EVERY), len(words), _NEW_WORD_EVERY):
                words[index] = rng.randbytes(7).translate(_LETTERS).decode()
            yield " ".join(words)


if __name__ == "__main__":
    main()
