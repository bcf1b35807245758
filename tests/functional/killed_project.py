"""Kill `moelpr run` at random moments until it has finished, and compare the result with that of an unbroken run.

    python -m tests.functional.killed_project --kills 20

Each kill takes the engine, a random process below it (a step, a rank, a worker), or all at once, by SIGKILL; or the
engine by SIGTERM. Exported model, corpora and evaluation must be the same bytes.
"""

import argparse
import hashlib
import os
import random
import signal
import subprocess
import sys
import tempfile
import time
from contextlib import suppress
from pathlib import Path

import psutil

from tests.support.tiny_project import write_project

# The compared results: no times of day, no durations.
RESULTS = ("hf/*", "data/*_document.*", "data/*.jsonl", "evaluation/results.json", "evaluation/routing.json")
COMMAND = [sys.executable, "-m", "moelpr", "run", "languages.yaml"]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--kills", type=int, default=20, help="number of kills (default: %(default)s)")
    parser.add_argument("--seed", type=int, default=0, help="seed of their moments and targets (default: %(default)s)")
    args = parser.parse_args()
    with tempfile.TemporaryDirectory() as name:
        print("unbroken:", end=" ", flush=True)
        start = time.monotonic()
        expected = results(run_project(Path(name) / "unbroken"))
        duration = time.monotonic() - start
        print(f"{duration:.0f} s, {len(expected)} files")
        kills = number = 0
        while kills < args.kills:
            folder = Path(name) / f"killed-{number}"
            made = run_killed(folder, random.Random(f"{args.seed} {number}"), duration, args.kills - kills)
            found = results(folder)
            different = [path for path in expected.keys() | found.keys() if expected.get(path) != found.get(path)]
            print(f"run {number}: {made} kills, {len(different)} of {len(expected)} files differ {different[:3]}")
            if different:
                sys.exit(1)
            kills, number = kills + made, number + 1
    print(f"{kills} kills in {number} runs: every result has the bytes of an unbroken run")


def run_project(folder: Path) -> Path:
    folder.mkdir()
    write_project(folder)
    subprocess.run(COMMAND, cwd=folder, check=True, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
    return folder


def run_killed(folder: Path, draw: random.Random, duration: float, most: int) -> int:
    """Run a project to its end, with at most so many kills; returns their number."""
    folder.mkdir()
    write_project(folder)
    kills = 0
    while True:
        with open(folder / "log", "a") as log:
            engine = subprocess.Popen(COMMAND, cwd=folder, stdout=log, stderr=log, start_new_session=True)
            try:
                code = engine.wait(draw.uniform(0.5, duration / 4) if kills < most else None)
            except subprocess.TimeoutExpired:
                kills += kill(engine.pid, draw)
                engine.wait()
                continue
        if code == 0:
            return kills
        if kills >= most and "another process" not in (folder / "log").read_text()[-500:]:
            raise SystemExit(f"exit code {code} without a kill:\n{(folder / 'log').read_text()[-2000:]}")
        time.sleep(1)


def kill(engine: int, draw: random.Random) -> int:
    """Kill something of a run; returns 1, or 0 if it has just ended."""
    with suppress(psutil.NoSuchProcess):
        below = psutil.Process(engine).children(recursive=True)
        kind = draw.choice(("engine", "one", "all", "term"))
        if kind == "one" and below:
            draw.choice(below).kill()
            time.sleep(0.2)
            psutil.Process(engine).wait(120)  # it reports the failure and ends
        elif kind == "term":
            os.kill(engine, signal.SIGTERM)
        else:
            for process in below if kind == "all" else ():
                with suppress(psutil.NoSuchProcess):
                    process.kill()
            os.kill(engine, signal.SIGKILL)
        return 1
    return 0


def results(folder: Path, output: str = "out") -> dict[str, str]:
    """Path → SHA-256 of everything that must be equal."""
    paths = sorted(path for pattern in RESULTS for path in (folder / output).glob(pattern) if path.is_file())
    return {str(path.relative_to(folder)): hashlib.sha256(path.read_bytes()).hexdigest() for path in paths}


if __name__ == "__main__":
    main()
