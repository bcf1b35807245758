"""A campaign of faults against all commands: kills, damaged and hostile input, full disks, two jobs on one output.

    python -m tests.faults --seed 1 --minutes 10
    python -m tests.faults --seed 1 --case corpora:17

Every case must end in the right result, or in one sentence with exit code 1 or 2, and leave no process and no temporary
file. Anything else is printed with the command that repeats it, and the campaign exits with code 1. Cases run in forks
of this process, which imports everything once, each with a limit of memory and time; kills also hit commands that are
started as usual. docs/reliability.md has the shares of the kinds.
"""

import os

# Set before the imports: this process forks, so it may have one thread only.
os.environ |= {"OMP_NUM_THREADS": "1", "OPENBLAS_NUM_THREADS": "1", "TOKENIZERS_PARALLELISM": "false"}
os.environ["JE_ARROW_MALLOC_CONF"] = "background_thread:false"

import argparse
import gc
import shutil
import sys
import tempfile
import time
import warnings
from collections import Counter
from concurrent.futures import FIRST_COMPLETED, Future, ProcessPoolExecutor, wait
from importlib import import_module
from multiprocessing import get_context
from pathlib import Path

from benchmarks.common import install_megatron, print_table
from moelpr.base.command import run_command
from moelpr.base.errors import UserError
from moelpr.base.machine import available_cpus

# A fork copies the table of all pages: large pages halve the time of most cases.
_PAGES = {"GLIBC_TUNABLES": "glibc.malloc.hugetlb=1", "PYTHONMALLOC": "malloc"}


def main() -> None:
    if not _PAGES.items() <= os.environ.items():
        os.execve(sys.executable, sys.orig_argv, os.environ | _PAGES)
    for name in _PAGES:  # not for the commands
        del os.environ[name]
    args = parse_arguments()
    sys.argv[1:] = []
    folder = Path(tempfile.mkdtemp(prefix="moelpr-faults-"))
    me = os.getpid()
    try:
        start_s = time.monotonic()
        import_everything()
        from tests.faults import material

        material.make(folder / "material")
        print(f"material made in {time.monotonic() - start_s:.0f} s", flush=True)
        campaign = Campaign(folder, args.seed, args.kinds)
        if args.case:
            failures = campaign.repeat(*args.case)
        else:
            failures = campaign.run(time.monotonic() + 60 * args.minutes)
            campaign.print_counts()
    finally:
        if os.getpid() == me:
            gc.unfreeze()
            shutil.rmtree(folder, ignore_errors=True)
    if failures:
        sys.exit(1)


def parse_arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    add = parser.add_argument
    add("--seed", type=int, default=1, metavar="N", help="of all random choices (default: %(default)s)")
    add("--minutes", type=float, default=8.0, metavar="X", help="time for new cases to start (default: %(default)s)")
    add("--kinds", nargs="+", metavar="KIND", help="kinds of cases (default: all)")
    add("--case", type=kind_and_number, metavar="KIND:NUMBER", help="repeat one case of this --seed")
    return parser.parse_args()


def kind_and_number(text: str) -> tuple[str, int]:
    kind, _, number = text.rpartition(":")
    return kind, int(number)


def import_everything() -> None:
    """Import the modules of the commands, so that their forks start at once."""
    warnings.simplefilter("ignore")  # about optional packages
    install_megatron()
    from tests.faults.commands import COMMANDS
    from tests.faults.processes import function_of

    for command in COMMANDS.values():
        if command.name:
            function_of(command.name)
    for module in _IMPORTED_LATER:
        import_module(module)
    gc.collect()
    gc.freeze()  # the collector would copy all pages of a fork


_IMPORTED_LATER = """
moelpr.train.train moelpr.model.layers.loading moelpr.measure.evaluate.compare moelpr.measure.evaluate.text_results
moelpr.measure.evaluate.routing_results moelpr.project.comparison moelpr.measure.report.run_report
tests.faults.kinds pyarrow.parquet sentencepiece torch.utils.tensorboard
transformers.models.auto.modeling_auto transformers.models.qwen2.modeling_qwen2
transformers.models.qwen2_moe.modeling_qwen2_moe transformers.models.qwen2.tokenization_qwen2
""".split()


class Campaign:
    """Cases of several kinds, in forks of this process."""

    def __init__(self, folder: Path, seed: int, kinds: list[str] | None) -> None:
        from tests.faults.cases import why_no_disk
        from tests.faults.kinds import KINDS

        if unknown := set(kinds or ()) - KINDS.keys():
            raise UserError(f"unknown --kinds {', '.join(sorted(unknown))}; there are {', '.join(KINDS)}")
        self._kinds = {name: KINDS[name] for name in kinds or KINDS}
        if "full disks" in self._kinds and (why := why_no_disk(folder / "disk")):
            print(f"full disks are left out: {why}")
            del self._kinds["full disks"]
        self._folder, self._seed = folder, seed
        self._counts: dict[str, Counter[str]] = {name: Counter() for name in self._kinds}
        self._cpu_s: Counter[str] = Counter()
        self._running: dict[Future[tuple[str, str, float]], tuple[str, int]] = {}  # kind, number

    def run(self, end_s: float) -> int:
        """Try cases, one per CPU at once, until `end_s` (of the monotonic clock), and one of each kind in any case.

        The kinds take turns by their shares, so that the same cases are drawn on every machine, only more or fewer.

        Returns:
            The number of failures.
        """
        started: Counter[str] = Counter()
        with ProcessPoolExecutor(available_cpus(), get_context("fork")) as pool:
            while (goes_on := time.monotonic() < end_s or not all(self._counts.values())) or self._running:
                if goes_on and len(self._running) < available_cpus():
                    kind = min(self._kinds, key=lambda name: started[name] / self._kinds[name].share)
                    self._start(pool, kind, started[kind])
                    started[kind] += 1
                else:
                    self._finish_one()
        return sum(counts["failed"] for counts in self._counts.values())

    def repeat(self, kind: str, number: int) -> int:
        with ProcessPoolExecutor(1, get_context("fork")) as pool:
            self._start(pool, kind, number)
            self._finish_one()
        print(f"{kind}: {', '.join(self._counts[kind])}")
        return self._counts[kind]["failed"]

    def _start(self, pool: ProcessPoolExecutor, kind: str, number: int) -> None:
        from tests.faults.cases import Case
        from tests.faults.kinds import try_case

        case = Case(kind, self._seed, number, self._folder / f"{kind} {number}", self._folder / "material")
        self._running[pool.submit(try_case, case)] = kind, number

    def _finish_one(self) -> None:
        done = wait(self._running, return_when=FIRST_COMPLETED).done.pop()
        kind, number = self._running.pop(done)
        outcome, words, cpu_s = done.result()
        self._cpu_s[kind] += cpu_s
        self._counts[kind][outcome] += 1
        if (total := sum(counts.total() for counts in self._counts.values())) % 200 == 0:
            print(f"{total:,} cases", flush=True)
        if outcome == "failed":
            again = f'.venv/bin/python -m tests.faults --seed {self._seed} --case "{kind}:{number}"'
            print(f"\nFAILED {kind} {number}: {words}\n    {again}", flush=True)

    def print_counts(self) -> None:
        """Cases by kind and outcome."""
        from tests.faults.cases import Outcome

        print()
        print_table(
            [
                {"kind": kind, "cases": counts.total()}
                | {str(outcome): counts[outcome] for outcome in Outcome}
                | {"CPU s": self._cpu_s[kind], "of a case": self._cpu_s[kind] / max(1, counts.total())}
                for kind, counts in self._counts.items()
            ]
        )


if __name__ == "__main__":
    run_command(main)
