"""Preprocessing with gigatoken from zst, Parquet and stand-ins for a web server and S3, against plain JSON lines.

The text is that of `benchmarks.preprocess`; Parquet has FineWeb-2's row groups of 1,000 rows. The stand-ins are one
server in Python on this machine, whose processor time is part of the result. What writes tokens only is reported next
to ours with the same library, on less text: datatrove's tokenizer and, from the folder of Megatron-LM that `megatron`
names, its two scripts.
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

DEFAULTS = {"megabytes": 400, "peers_megabytes": 100, "workers": 2, "folder": "", "megatron": ""}
_ROWS = 1000


def run(turns: Turns, settings: Namespace) -> Iterator[tuple[str, Times]]:
    with working_folder(Path(settings.folder) if settings.folder else None) as work:
        served, out = work / "served", work / "out"
        served.mkdir(exist_ok=True)
        tokenizer, texts = preprocess.demo(work, None)
        name, less = str(settings.megabytes), str(settings.peers_megabytes)
        lines, fewer = (preprocess.repeated(texts, served / f"{size}.jsonl", int(size)) for size in (name, less))
        pack(lines)
        with text_server(served) as server:
            os.environ |= server.environment

            def ours(file: Path | str, backend: str = "gigatoken") -> list[str]:
                words = ["--input", file, "--output-prefix", out, "--tokenizer-model", tokenizer]
                words += ["--tokenizer-backend", backend, "--workers", settings.workers, "--overwrite"]
                fixed = "--language expanded --append-eod --tokenizer-type HuggingFaceTokenizer"
                return python(ROOT / "data_tools/preprocess_data.py", *words, *fixed.split())

            contenders = {
                "JSON lines": ours(lines),
                "zst": ours(f"{lines}.zst"),
                "Parquet": ours(lines.with_suffix(".parquet")),
                "http JSON lines": ours(server.uri("http", f"{name}.jsonl")),
                "http Parquet": ours(server.uri("http", f"{name}.parquet")),
                "s3 JSON lines": ours(server.uri("s3", f"{name}.jsonl")),
                "s3 Parquet": ours(server.uri("s3", f"{name}.parquet")),
            }
            hugging_face = {"tokenizers": ours(fewer, "reference")}
            fast = {"gigatoken": ours(fewer)}
            script = ROOT / "benchmarks/baselines/datatrove_tokenizer.py"
            hugging_face["datatrove"] = python(script, fewer, tokenizer, work, settings.workers)
            if folder := settings.megatron:
                words = ["--input", fewer, "--output-prefix", out, "--append-eod", "--tokenizer-model", tokenizer]
                words += ["--tokenizer-type", "HuggingFaceTokenizer"]
                script = Path(folder) / "tools/preprocess_data.py"
                hugging_face["Megatron"] = python(script, *words, "--workers", settings.workers, path=folder)
                script = Path(folder) / "tools/preprocess_data_fast.py"
                fast["Megatron, fast"] = python(script, *words, "--use-gigatoken", path=folder)
            cases = {
                f"{name} MB, gigatoken": contenders,
                f"{less} MB, tokenizers": hugging_face,
                f"{less} MB, peers with gigatoken": fast,
            }
            for case, commands in cases.items():
                yield case, turns.take(commands, lambda command: preprocess.run(command)[turns.cpu_time])


def python(*words: object, path: str = "") -> list[str]:
    """A command of this Python, which looks for modules in `path` first."""
    return ["env", *([f"PYTHONPATH={path}"] if path else []), sys.executable, *map(str, words)]


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
