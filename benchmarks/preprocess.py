"""How fast preprocessing is, and how much memory it takes. Wanted, in one run on one corpus:

- with Hugging Face's tokenizers, JSON and writing included, at most 1.25 times the time of a bare `encode_batch_fast`;
- with gigatoken at least 8 times as fast as that;
- at most 1 GiB of memory in all processes together, the same for a corpus ten times as large.

    python benchmarks/preprocess.py [--megabytes 200] [--work DIR] [--peer "COMMAND"] [--output FILE]

The corpus is the demo's, repeated with variations: lines in another order, and one word in twenty replaced by one that
was never seen before, so that no library gets through by remembering. The tokenizer is a byte-level BPE with 32,000
tokens, trained on the demo's text. The ways take turns; the fastest of the rounds counts. The CPU's time stands beside,
which other processes on the machine disturb less. Memory is the sum of the processes' proportional shares (PSS), looked
at ten times a second.

A peer is any other program that tokenizes JSON lines, such as Megatron-LM's:

    --peer "python Megatron-LM/tools/preprocess_data.py --input {input} --output-prefix {output} --append-eod \\
        --tokenizer-type HuggingFaceTokenizer --tokenizer-model {tokenizer} --workers {workers}"
"""

import argparse
import json
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

ROOT = Path(__file__).resolve().parent.parent
WANTED = {"huggingface_to_bare": 1.25, "gigatoken_to_huggingface": 8.0, "peak_gib": 1.0}
_LETTERS = (b"aeioubdfgklmnprstvz" * 14)[:256]  # for any byte
_EVERY = 20  # one word in so many is new


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--megabytes", type=int, default=200, help="size of the corpus (default: %(default)s)")
    parser.add_argument("--large", type=int, default=10, help="times as large for the memory (default: %(default)s)")
    parser.add_argument("--rounds", type=int, default=2, help="default: %(default)s")
    parser.add_argument("--workers", type=int, default=len(os.sched_getaffinity(0)), help="default: one per core")
    parser.add_argument("--work", type=Path, help="folder for corpora, kept (default: a temporary one)")
    parser.add_argument("--cache", type=Path, help="where the demo's wheel is (see data_tools/demo_corpus.py)")
    parser.add_argument("--peer", help="a command with {input}, {output}, {tokenizer} and perhaps {workers}")
    parser.add_argument("--output", type=Path, help="write the JSON here too")
    arguments = parser.parse_args()
    with tempfile.TemporaryDirectory() as temporary:
        result = measure(arguments, arguments.work or Path(temporary))
    text = json.dumps(result, indent=2)
    print(text)
    if arguments.output:
        arguments.output.write_text(text + "\n")


def measure(arguments: argparse.Namespace, work: Path) -> dict[str, Any]:
    """Build what is missing of the corpora, and time every way."""
    tokenizer, texts = demo(work, arguments.cache)
    corpus = repeated(texts, work / f"{arguments.megabytes}.jsonl", arguments.megabytes)
    large = repeated(
        texts, work / f"{arguments.megabytes * arguments.large}.jsonl", arguments.megabytes * arguments.large
    )
    ways = {
        "bare": [
            sys.executable,
            str(ROOT / "benchmarks/peers/encode_batch.py"),
            str(tokenizer / "tokenizer.json"),
            str(corpus),
        ],
        "huggingface": ours(corpus, tokenizer, "reference", work, arguments.workers),
        "gigatoken": ours(corpus, tokenizer, "gigatoken", work, arguments.workers),
    }
    if arguments.peer:
        places = {
            "input": corpus,
            "output": work / "out" / "peer",
            "tokenizer": tokenizer,
            "workers": arguments.workers,
        }
        ways["peer"] = shlex.split(arguments.peer.format(**places))
    load = os.getloadavg()[0]
    seconds: dict[str, float] = {}
    cpu: dict[str, float] = {}
    peaks: dict[str, float] = {}
    for _ in range(arguments.rounds):
        for name, command in ways.items():
            shutil.rmtree(work / "out", ignore_errors=True)
            (work / "out").mkdir()
            wall_s, cpu_s, peak_bytes, printed = run(command)
            if name == "bare":
                wall_s, cpu_s = map(float, printed.split())
            seconds[name] = min(wall_s, seconds.get(name, float("inf")))
            cpu[name] = min(cpu_s, cpu.get(name, float("inf")))
            peaks[name] = max(peak_bytes / 2**30, peaks.get(name, 0))
    shutil.rmtree(work / "out", ignore_errors=True)
    _, _, peak_bytes, _ = run(ours(large, tokenizer, "gigatoken", work, arguments.workers))
    peaks["gigatoken_large"] = peak_bytes / 2**30
    shutil.rmtree(work / "out", ignore_errors=True)
    megabytes = corpus.stat().st_size / 1e6
    result: dict[str, Any] = {
        "megabytes": round(megabytes, 1),
        "workers": arguments.workers,
        "load_before": round(load, 2),
        "seconds": {name: round(value, 2) for name, value in seconds.items()},
        "megabytes_per_s": {name: round(megabytes / value, 1) for name, value in seconds.items()},
        "cpu_seconds": {name: round(value, 2) for name, value in cpu.items()},
        "huggingface_to_bare": round(seconds["huggingface"] / seconds["bare"], 3),
        "huggingface_to_bare_cpu": round(cpu["huggingface"] / cpu["bare"], 3),
        "gigatoken_to_huggingface": round(seconds["huggingface"] / seconds["gigatoken"], 2),
        "gigatoken_to_huggingface_cpu": round(cpu["huggingface"] / cpu["gigatoken"], 2),
        "peak_gib": {name: round(value, 3) for name, value in peaks.items() if name != "bare"},
        "wanted": WANTED,
    }
    if arguments.peer:
        result["peer_to_huggingface"] = round(seconds["peer"] / seconds["huggingface"], 3)
        result["peer_to_gigatoken"] = round(seconds["peer"] / seconds["gigatoken"], 2)
    return result


def ours(corpus: Path, tokenizer: Path, backend: str, work: Path, workers: int) -> list[str]:
    words = ["--input", corpus, "--output-prefix", work / "out" / backend, "--language", "expanded", "--append-eod"]
    words += ["--tokenizer-type", "HuggingFaceTokenizer", "--tokenizer-model", tokenizer, "--workers", workers]
    words += ["--tokenizer-backend", backend, "--log-interval", 1 << 40]
    return [sys.executable, str(ROOT / "data_tools/preprocess_data.py"), *map(str, words)]


def run(command: list[str]) -> tuple[float, float, int, str]:
    """Seconds, the CPU's seconds, the most bytes its processes took together, and what it printed."""
    environment = {**os.environ, "PYTHONPATH": str(ROOT)}
    before = resource.getrusage(resource.RUSAGE_CHILDREN)
    started = time.perf_counter()
    with tempfile.TemporaryFile("w+") as output:
        process = subprocess.Popen(command, stdout=output, env=environment)
        peak = 0
        while process.poll() is None:
            peak = max(peak, proportional_bytes(process.pid))
            time.sleep(0.1)
        seconds = time.perf_counter() - started
        output.seek(0)
        printed = output.read()
    if process.returncode:
        sys.exit(f"{shlex.join(command)} ended with code {process.returncode}")
    after = resource.getrusage(resource.RUSAGE_CHILDREN)
    return seconds, after.ru_utime + after.ru_stime - before.ru_utime - before.ru_stime, peak, printed


def proportional_bytes(pid: int) -> int:
    total = 0
    try:
        parent = psutil.Process(pid)
        for process in [parent, *parent.children(recursive=True)]:
            try:
                total += process.memory_full_info().pss
            except psutil.Error:
                pass  # it has just ended
    except psutil.Error:
        pass
    return total


def demo(work: Path, cache: Path | None) -> tuple[Path, list[str]]:
    """The demo's text, and a tokenizer of it."""
    corpus, tokenizer = work / "demo", work / "tokenizer"
    tools = ROOT / "data_tools"
    where = ["--cache", str(cache)] if cache else []
    if not corpus.exists():
        call(tools / "demo_corpus.py", "--output", corpus, *where)
    files = sorted(corpus.glob("train.*.jsonl"))
    if not tokenizer.exists():
        call(tools / "demo_tokenizer.py", "--input", *files, "--output", tokenizer, "--vocab-size", "32000")
    return tokenizer, [json.loads(line)["text"] for path in files for line in path.read_text("utf-8").splitlines()]


def call(tool: Path, *words: object) -> None:
    environment = {**os.environ, "PYTHONPATH": str(ROOT)}
    subprocess.run(
        [sys.executable, str(tool), *map(str, words)], env=environment, check=True, stdout=subprocess.DEVNULL
    )


def repeated(texts: list[str], path: Path, megabytes: int) -> Path:
    """Write the texts again and again, varied, until the file has its size."""
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
    """Endless documents: lines shuffled, and every twentieth word or so a new one."""
    while True:
        for text in rng.sample(texts, len(texts)):
            lines = text.split("\n")
            rng.shuffle(lines)
            words = "\n".join(lines).split(" ")
            for place in range(rng.randrange(_EVERY), len(words), _EVERY):
                words[place] = rng.randbytes(7).translate(_LETTERS).decode()
            yield " ".join(words)


if __name__ == "__main__":
    main()
