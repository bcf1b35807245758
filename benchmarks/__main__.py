"""Compare contenders that do the same work in the same process with a baseline, in turns.

    python -m benchmarks --list
    python -m benchmarks NAME [KEY=VALUE…] [NAME [KEY=VALUE…]…] [--rounds N] [--cpu-time] [--json FILE]

Ratios are medians of the rounds' ratios. KEY=VALUE changes a setting that --list shows, of the benchmark named before
it. The exit code is 1 if a limit is exceeded.
"""

import math
import statistics
import sys
from argparse import Namespace
from collections.abc import Iterator
from dataclasses import asdict, dataclass
from importlib import import_module
from typing import Any

from torch.utils.benchmark import Compare, Measurement, TaskSpec

from benchmarks.common import add_json, argument_parser, print_table, write_json
from benchmarks.timing import Times, Turns, time_ratio
from moelpr.process.command import run_command
from moelpr.process.errors import UserError


@dataclass(frozen=True)
class Benchmark:
    """A comparison that benchmarks.comparisons.NAME explains and runs; limits are None if there is none.

    Attributes:
        measures: the work that is timed.
        baseline: what it is compared with.
        rounds: number of rounds, unless --rounds is passed.
        ratio: the largest accepted ratio to the baseline's time.
        extra_s: the largest accepted difference from the baseline's time, in seconds.
        only_reported: the contenders without a limit.
    """

    measures: str
    baseline: str
    rounds: int
    ratio: float | None = None
    extra_s: float | None = None
    only_reported: tuple[str, ...] = ()


BENCHMARKS = {
    "checksums": Benchmark("verifying and writing a checkpoint's checksums", "reading it in one thread", 3),
    "evaluation": Benchmark("evaluating documents", "a forward pass on the same batches", 30),
    "generation": Benchmark("an export in transformers that reads and writes", "its dense base", 7),
    "language_bits": Benchmark("the C++ part of the .lang format", "numpy", 10, ratio=1.0),
    "launcher": Benchmark("launch/stage1.sh until the trainer starts", "torchrun", 21, extra_s=0.2),
    "metrics_overhead": Benchmark("a training step with its metrics", "the same step without them", 40, ratio=1.02),
    "new_rows": Benchmark("a step with new tokens", "a step without", 9, ratio=1.03, only_reported=("stage 0",)),
    "packed_attention": Benchmark("attention within documents", "attention over the full sequence", 5),
    "text_sources": Benchmark(
        "preprocessing zst, Parquet and text at URIs",
        "JSON lines",
        3,
        ratio=1.11,
        only_reported=("datatrove", "Megatron", "Megatron, fast"),
    ),
    "read_samples": Benchmark("reading samples with language bits", "Megatron's GPTDataset", 100, ratio=1.11),
}


def main() -> None:
    parser = argument_parser(__doc__)
    parser.add_argument("words", nargs="*", metavar="NAME", help="a benchmark, followed by its settings as KEY=VALUE")
    parser.add_argument("--list", action="store_true", help="show all benchmarks and their settings")
    parser.add_argument("--rounds", type=int, metavar="N", help="number of measured rounds (default: see --list)")
    parser.add_argument("--cpu-time", action="store_true", help="measure CPU time, which other processes disturb less")
    add_json(parser)
    args = parser.parse_args()
    if args.list or not args.words:
        table = [{"name": name, **asdict(one), "settings": settings_text(name)} for name, one in BENCHMARKS.items()]
        print_table([{key: "" if value is None else value for key, value in row.items()} for row in table])
        return
    results = {}
    for name, settings in chosen(args.words):
        turns = Turns(args.rounds or BENCHMARKS[name].rounds, args.cpu_time)
        cases = list(import_module(f"benchmarks.comparisons.{name}").run(turns, settings))
        Compare([*measurements(name, cases)]).print()
        results[name] = [row for case, times in cases for row in ratios(BENCHMARKS[name], case, times)]
        print_table(results[name], "case", "contender", "baseline", "ratio", "extra_s", "is_kept")
    write_json(results, args.json)
    sys.exit(int(any(row["is_kept"] is False for rows in results.values() for row in rows)))


def settings_of(name: str) -> Namespace:
    """A benchmark's settings with their defaults."""
    return Namespace(**import_module(f"benchmarks.comparisons.{name}").DEFAULTS)


def settings_text(name: str) -> str:
    """The settings as the command line takes them."""
    texts = {key: str(value).strip("()").replace(" ", "") for key, value in vars(settings_of(name)).items()}
    return " ".join(f"{key}={text}" for key, text in texts.items())


def chosen(words: list[str]) -> list[tuple[str, Namespace]]:
    """Benchmarks and settings from the words of the command line."""
    found: list[tuple[str, Namespace]] = []
    for word in words:
        key, _, text = word.partition("=")
        if word in BENCHMARKS:
            found.append((word, settings_of(word)))
        elif text and found and hasattr(settings := found[-1][1], key):
            kind = type(getattr(settings, key))
            setattr(settings, key, tuple(map(int, text.split(","))) if kind is tuple else kind(text))
        else:
            raise UserError(f"{word} is no benchmark and no setting of the benchmark before it; see --list")
    return found


def measurements(name: str, cases: list[tuple[str, Times]]) -> Iterator[Measurement]:
    """The times as torch's `Compare` shows them: a row for each case, a column for each contender."""
    for case, times in cases:
        for contender, seconds in times.items():
            yield Measurement(1, seconds, TaskSpec("", "", label=name, sub_label=case, description=contender))


def ratios(benchmark: Benchmark, case: str, times: Times) -> Iterator[dict[str, Any]]:
    """Compare every contender with the baseline, which is the first."""
    baseline, *contenders = times
    for contender in contenders:
        pairs = zip(times[contender], times[baseline], strict=True)
        row = {"case": case, "contender": contender, "baseline": baseline, "times_s": times, "is_kept": ""}
        row |= {"ratio": time_ratio(times, contender, baseline), "extra_s": statistics.median(a - b for a, b in pairs)}
        limits = {name: getattr(benchmark, name) for name in ("ratio", "extra_s")}
        if contender not in benchmark.only_reported and any(limits.values()):
            row["is_kept"] = all(row[name] <= (limit or math.inf) for name, limit in limits.items())
        yield row


if __name__ == "__main__":
    run_command(main)
