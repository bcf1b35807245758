"""Time and memory that the benchmark of preprocessing measures."""

import sys

from benchmarks.preprocess import run


def test_time_and_memory_are_those_of_all_processes() -> None:
    """Two processes of 100 MB each that work half a second."""
    child = "import time; x = b'1' * 100_000_000; t = time.process_time()\nwhile time.process_time() < t + 0.5: pass"
    start = f"import subprocess, sys; other = subprocess.Popen([sys.executable, '-c', {child!r}]);"
    program = f"{start} exec({child!r}); other.wait(); print(7)"
    wall_s, cpu_s, peak_bytes, printed = run([sys.executable, "-c", program])
    assert printed == "7\n"
    assert wall_s >= 0.5 and 1.0 <= cpu_s < 10
    assert 190e6 < peak_bytes < 400e6
