"""Preprocessing with gigatoken from zst, Parquet and stand-ins for a web server and S3, against plain JSON lines.

The text is that of `benchmarks.preprocess`; Parquet has FineWeb-2's row groups of 1,000 rows. The stand-ins are one
server in Python on this machine, whose processor time is part of the result. datatrove's tokenizer, which uses Hugging
Face's library and writes tokens only, is reported next to ours with that library.
"""

import json
import os
import sys
from argparse import Namespace
from collections.abc import Iterator
from pathlib import Path

import pyarrow
from pyarrow import parquet

from benchmarks import preprocess
from benchmarks.common import ROOT, working_folder
from benchmarks.timing import Times, Turns
from tests.support.text_server import text_server

DEFAULTS = {"megabytes": 100, "workers": 2, "folder": ""}
_ROWS = 1000


def run(turns: Turns, settings: Namespace) -> Iterator[tuple[str, Times]]:
    with working_folder(Path(settings.folder) if settings.folder else None) as work:
        served, out = work / "served", work / "out"
        served.mkdir(exist_ok=True)
        tokenizer, texts = preprocess.demo(work, None)
        name = f"{settings.megabytes}"
        lines = preprocess.repeated(texts, served / f"{name}.jsonl", settings.megabytes)
        pack(lines)
        with text_server(served) as server:
            os.environ |= server.environment

            def ours(file: Path | str, backend: str = "gigatoken") -> list[str]:
                words = ["--input", file, "--output-prefix", out, "--tokenizer-model", tokenizer]
                words += ["--tokenizer-backend", backend, "--workers", settings.workers, "--overwrite"]
                fixed = "--language expanded --append-eod --tokenizer-type HuggingFaceTokenizer"
                return [sys.executable, str(ROOT / "data_tools/preprocess_data.py"), *map(str, words), *fixed.split()]

            baseline = str(ROOT / "benchmarks/baselines/datatrove_tokenizer.py")
            contenders = {
                "JSON lines": ours(lines),
                "zst": ours(f"{lines}.zst"),
                "Parquet": ours(lines.with_suffix(".parquet")),
                "http JSON lines": ours(server.uri("http", f"{name}.jsonl")),
                "http Parquet": ours(server.uri("http", f"{name}.parquet")),
                "s3 JSON lines": ours(server.uri("s3", f"{name}.jsonl")),
                "s3 Parquet": ours(server.uri("s3", f"{name}.parquet")),
            }
            yield (
                f"{name} MB, gigatoken",
                turns.take(contenders, lambda command: preprocess.run(command)[turns.cpu_time]),
            )
            others = {
                "tokenizers": ours(lines, "reference"),
                "datatrove": [sys.executable, baseline, str(lines), str(tokenizer), str(work), str(settings.workers)],
            }
            yield f"{name} MB, tokenizers", turns.take(others, lambda command: preprocess.run(command)[turns.cpu_time])


def pack(lines: Path) -> None:
    """Write the lines as zst and Parquet, unless they are there."""
    packed, table = Path(f"{lines}.zst"), lines.with_suffix(".parquet")
    if not packed.exists():
        with open(lines, "rb") as file, pyarrow.CompressedOutputStream(str(packed), "zstd") as target:
            while block := file.read(1 << 20):
                target.write(block)
    if not table.exists():
        texts = [json.loads(line)["text"] for line in lines.read_text("utf-8").splitlines()]
        parquet.write_table(pyarrow.table({"text": texts}), table, row_group_size=_ROWS)
