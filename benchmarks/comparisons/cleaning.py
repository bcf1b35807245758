"""`moelpr data clean` against datatrove's own reader, MinHash and writer in its own executor, with the same words.

Both find near duplicates in the same JSON lines, of random words; a fifth of the documents are copies. moelpr also
counts by language and writes what it removes.
"""

import json
import random
import tempfile
from argparse import Namespace
from collections.abc import Iterator
from contextlib import redirect_stderr, redirect_stdout
from os import devnull
from pathlib import Path
from shutil import rmtree

from datatrove.executor import LocalPipelineExecutor
from datatrove.pipeline.dedup import minhash
from datatrove.pipeline.readers import JsonlReader
from datatrove.pipeline.writers import JsonlWriter

from benchmarks.timing import Times, Turns
from data_tools import clean_text
from data_tools.cleaning.references import Words

DEFAULTS = {"documents": 20000, "words": 200, "tasks": 4, "workers": 2}


def run(turns: Turns, settings: Namespace) -> Iterator[tuple[str, Times]]:
    draw = random.Random(0)
    vocabulary = ["".join(draw.choices("abcdefghijklmnop", k=draw.randint(2, 9))) for _ in range(20_000)]
    texts = [" ".join(draw.choices(vocabulary, k=settings.words)) for _ in range(settings.documents * 4 // 5)]
    texts += draw.choices(texts, k=settings.documents - len(texts))
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        (folder / "text").mkdir()
        for task in range(settings.tasks):  # datatrove does not divide files
            lines = [json.dumps({"text": text, "id": "x"}) + "\n" for text in texts[task :: settings.tasks]]
            (folder / "text" / f"{task}.jsonl").write_text("".join(lines))
        size = sum(file.stat().st_size for file in (folder / "text").iterdir())
        contenders = {"datatrove": lambda: plain(folder, settings), "moelpr": lambda: ours(folder, settings)}
        yield f"{size / 1e6:.0f} MB", turns.take(contenders)


def ours(folder: Path, settings: Namespace) -> None:
    numbers = ["--tasks", str(settings.tasks), "--workers", str(settings.workers), "--overwrite"]
    with open(devnull, "w") as nowhere, redirect_stdout(nowhere), redirect_stderr(nowhere):
        clean_text.main(["--input", str(folder / "text"), "--output", str(folder / "ours"), *numbers])


def plain(folder: Path, settings: Namespace) -> None:
    places = {name: str(folder / "plain" / name) for name in ("signatures", "pairs", "remove", "out", "logs")}
    rmtree(folder / "plain", ignore_errors=True)
    reader = JsonlReader(str(folder / "text"))
    pipelines = [
        ([reader, minhash.MinhashDedupSignature(places["signatures"], language=Words())], settings.tasks),
        ([minhash.MinhashDedupBuckets(places["signatures"], places["pairs"])], 14),
        ([minhash.MinhashDedupCluster(places["pairs"], places["remove"])], 1),
        (
            [reader, minhash.MinhashDedupFilter(places["remove"]), JsonlWriter(places["out"], compression="zstd")],
            settings.tasks,
        ),
    ]
    for number, (steps, tasks) in enumerate(pipelines):
        workers = {"workers": min(settings.workers, tasks), "start_method": "fork"}
        LocalPipelineExecutor(steps, tasks, logging_dir=f"{places['logs']}/{number}", **workers).run()
