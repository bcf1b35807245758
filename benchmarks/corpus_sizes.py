"""Memory and time per byte while one large file is preprocessed: both stay the same from some size on.

    python -m benchmarks.corpus_sizes [--megabytes 5000] [--ways lines s3-parquet] [--work DIR] [--json FILE]

The text is that of `benchmarks.preprocess`: what is larger than 1 GB is that gigabyte again, far more than gigatoken's
caches hold. Parquet has FineWeb-2's row groups of 1,000 rows, at the S3 stand-in. Each row of the table is a part of
the file: the median and the largest sum of the processes' proportional set sizes (PSS), and the time of it alone.
"""

import contextlib
import json
import os
import subprocess
import sys
import time
from collections.abc import Iterator
from itertools import islice, pairwise
from pathlib import Path
from statistics import median
from typing import Any, NamedTuple

import psutil
import pyarrow
from pyarrow import parquet

from benchmarks import preprocess
from benchmarks.common import ROOT, add_json, argument_parser, environment, print_table, working_folder, write_json
from tests.support.text_server import text_server

_DIFFERENT_MEGABYTES = 1000
_ROWS = 1000
_PARTS = (0.0, 0.02, 0.06, 0.2, 0.5, 1)


class Sample(NamedTuple):
    """What a running job has used and written: seconds, processor seconds, memory and tokens in bytes."""

    wall_s: float
    cpu_s: float
    memory: int
    written: int


def main() -> None:
    parser = argument_parser(__doc__)
    parser.add_argument("--megabytes", type=int, default=5000, help="size of the text, in MB")
    parser.add_argument("--ways", nargs="+", default=["lines", "s3-parquet"], choices=["lines", "s3-parquet"])
    parser.add_argument("--workers", type=int, default=len(os.sched_getaffinity(0)), help="number of worker processes")
    parser.add_argument("--work", type=Path, help="folder for corpora, which is kept (default: a temporary folder)")
    add_json(parser)
    args = parser.parse_args()
    rows: list[dict[str, Any]] = []
    with working_folder(args.work) as work:
        (served := work / "served").mkdir(exist_ok=True)
        tokenizer, texts = preprocess.demo(work, None)
        different = min(args.megabytes, _DIFFERENT_MEGABYTES)
        text = preprocess.repeated(texts, work / f"different-{different}.jsonl", different)
        with text_server(served) as server:
            os.environ |= server.environment
            for way in args.ways:
                file = corpus(text, served, args.megabytes, way)
                name = str(file) if way == "lines" else server.uri("s3", file.name)
                samples = run(name, tokenizer, work / "out", args.workers)
                rows += [{"way": way} | row for row in parts(samples, args.megabytes)]
                file.unlink()
    print_table(rows)
    write_json(rows, args.json)


def run(name: str, tokenizer: Path, out: Path, workers: int) -> list[Sample]:
    """Preprocess a file, and look at the job twice a second."""
    words = ["--input", name, "--output-prefix", out, "--tokenizer-model", tokenizer, "--workers", workers]
    fixed = (
        "--overwrite --language expanded --append-eod --tokenizer-type HuggingFaceTokenizer --log-interval 100000000"
    )
    command = [sys.executable, str(ROOT / "data_tools/preprocess_data.py"), *map(str, words), *fixed.split()]
    samples, started = [], time.monotonic()
    with subprocess.Popen(command, stdout=subprocess.DEVNULL, env=environment()) as process:
        job = psutil.Process(process.pid)
        while process.poll() is None:
            with contextlib.suppress(psutil.Error, OSError):  # a worker has ended, or a file its new name
                written = sum(file.stat().st_size for file in out.parent.glob(f".{out.name}.unfinished/*.bin"))
                times = [one.cpu_times() for one in (job, *job.children(recursive=True))]
                cpu_s, memory = sum(one.user + one.system for one in times), preprocess.proportional_bytes(process.pid)
                samples.append(Sample(time.monotonic() - started, cpu_s, memory, written))
            time.sleep(0.5)
    if process.returncode:
        sys.exit(f"preprocessing {name} failed")
    return samples


def parts(samples: list[Sample], megabytes: int) -> Iterator[dict[str, Any]]:
    """The rows of the table, of parts of the file that each have an end."""
    total = max(one.written for one in samples)
    ends = [next(one for one in samples if one.written >= part * total) for part in _PARTS]
    for first, last in pairwise(ends):
        if size := (last.written - first.written) / total * megabytes / 1000:
            memory = [one.memory for one in samples if first.wall_s <= one.wall_s <= last.wall_s]
            yield {
                "GB": last.written / total * megabytes / 1000,
                "median MiB": median(memory) / 2**20,
                "largest MiB": max(memory) / 2**20,
                "CPU s per GB": (last.cpu_s - first.cpu_s) / size,
                "s per GB": (last.wall_s - first.wall_s) / size,
            }


def corpus(text: Path, folder: Path, megabytes: int, way: str) -> Path:
    """Write a corpus of a size."""
    path = folder / f"{megabytes}.{'jsonl' if way == 'lines' else 'parquet'}"
    lines = endless(text, megabytes * 1_000_000)
    if way == "lines":
        with open(path, "wb") as file:
            file.writelines(lines)
        return path
    schema = pyarrow.schema({"text": pyarrow.string()})
    with parquet.ParquetWriter(path, schema) as writer:
        while rows := [json.loads(line)["text"] for line in islice(lines, _ROWS)]:
            writer.write_table(pyarrow.table([rows], schema))
    return path


def endless(path: Path, num_bytes: int) -> Iterator[bytes]:
    """The lines of a file, again and again until there are `num_bytes`."""
    while num_bytes > 0:
        with open(path, "rb") as file:
            for line in file:
                yield line
                num_bytes -= len(line)
                if num_bytes <= 0:
                    break


if __name__ == "__main__":
    main()
