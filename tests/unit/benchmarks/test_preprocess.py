"""What the benchmark of preprocessing feeds the tokenizers, and what it takes for memory."""

import json
import random
import sys
from itertools import islice
from pathlib import Path

from benchmarks.preprocess import repeated, run, varied

TEXTS = ["turn on the light\nin the kitchen " * 10, "close the door\nand go " * 10]


def test_a_corpus_is_the_same_each_time_and_has_its_size(tmp_path: Path) -> None:
    first, second = (repeated(TEXTS, tmp_path / name, 1) for name in ("a.jsonl", "b.jsonl"))
    assert first.read_bytes() == second.read_bytes()
    assert 1_000_000 <= first.stat().st_size < 1_001_000
    assert all(json.loads(line)["text"] for line in first.read_text().splitlines())


def test_one_word_in_twenty_is_new() -> None:
    known = {word for text in TEXTS for word in text.split()}
    documents = list(islice(varied(TEXTS, random.Random(1)), 400))
    words = [word for document in documents for word in document.split()]
    new = [word for word in words if word not in known]
    assert 0.03 < len(new) / len(words) < 0.07
    assert len(set(new)) > 0.95 * len(new)


def test_time_and_memory_are_those_of_all_processes() -> None:
    """Two processes of 100 MB each that work half a second."""
    child = "import time; x = b'1' * 100_000_000; t = time.process_time()\nwhile time.process_time() < t + 0.5: pass"
    start = f"import subprocess, sys; other = subprocess.Popen([sys.executable, '-c', {child!r}]);"
    program = f"{start} exec({child!r}); other.wait(); print(7)"
    wall_s, cpu_s, peak_bytes, printed = run([sys.executable, "-c", program])
    assert printed == "7\n"
    assert wall_s >= 0.5 and 1.0 <= cpu_s < 10
    assert 190e6 < peak_bytes < 400e6
