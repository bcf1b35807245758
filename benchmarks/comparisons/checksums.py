"""Checksums of a checkpoint, which are verified before it is loaded, against reading its files in one thread.

The files have random bytes and were just written, so they are read from memory if memory suffices; a slower disk is the
limit then.
"""

import os
import tempfile
from argparse import Namespace
from collections.abc import Iterator
from pathlib import Path

from benchmarks.timing import Times, Turns
from moelpr.checkpoints.chain import verify_files, write_checksums

DEFAULTS = {"gib": 1.0, "files": 2, "folder": tempfile.gettempdir()}  # each file is read by one thread


def run(turns: Turns, settings: Namespace) -> Iterator[tuple[str, Times]]:
    with tempfile.TemporaryDirectory(dir=settings.folder) as folder:
        step = Path(folder, "run", "iter_0000001")
        step.mkdir(parents=True)
        block = os.urandom(1 << 24)
        paths = [step / f"__0_{number}.distcp" for number in range(settings.files)]
        for path in paths:
            with open(path, "wb") as out:
                for _ in range(round(settings.gib * 2**30 / settings.files / len(block))):
                    out.write(block)
        contenders = {
            "read in one thread": lambda: [read(path) for path in paths],
            "write": lambda: write_checksums(step),
            "verify": lambda: verify_files([step]),
        }
        yield f"{sum(path.stat().st_size for path in paths) / 1e9:.2f} GB", turns.take(contenders)


def read(path: Path) -> None:
    buffer = bytearray(1 << 20)
    with open(path, "rb", buffering=0) as file:
        while file.readinto(buffer):
            pass
