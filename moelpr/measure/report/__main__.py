"""A report of runs, while they train or afterwards; `live` follows a run on a terminal.

moelpr report runs/stage1 runs/stage2 --evaluation runs/evaluation/results.json
moelpr report live runs/stage1
"""

import argparse
import sys
from pathlib import Path
from typing import Any

from moelpr.base.command import CommandParser, program_name, run_command
from moelpr.base.errors import UserError


def main() -> None:
    command, *arguments = sys.argv[1:] or [""]
    if command == "live":
        follow_run(live_parser().parse_args(arguments))
    else:  # `runs` may be left out
        report_runs(report_parser().parse_args(arguments if command == "runs" else sys.argv[1:]))


def report_runs(args: argparse.Namespace) -> None:
    # After the arguments: matplotlib is slow to import.
    from moelpr.measure.report.checks import read_facts, read_verifications
    from moelpr.measure.report.language_results import read_evaluations
    from moelpr.measure.report.run_report import Report
    from moelpr.measure.report.runs import read_runs

    report = Report(
        runs=read_runs(args.runs),
        evaluation=read_evaluations(args.evaluation),
        checks=read_verifications(args.verification),
        facts=read_facts(args.facts) if args.facts else {},
    )
    print(report.write(args.output or args.runs[-1]))


def follow_run(args: argparse.Namespace) -> None:
    from moelpr.measure.report.live import show

    if not args.interval > 0:
        raise UserError(f"--interval must be above 0 seconds, got {args.interval:g}; for example, pass 2")
    show(args.run, args.interval, args.once)


def report_parser() -> argparse.ArgumentParser:
    parser = CommandParser(
        prog=program_name("python -m moelpr.measure.report") + " [runs]",
        description="Write report.html, report.md and report.json of one or several runs, running or finished.",
        epilog=f"To follow a run: {program_name('python -m moelpr.measure.report')} live RUN (see live --help).",
    )
    files: dict[str, Any] = {"nargs": "+", "type": Path, "default": [], "metavar": "FILE"}
    add = parser.add_argument
    add(
        "runs", nargs="+", type=Path, metavar="RUN", help="run folder (--save of the trainer), in the order of training"
    )
    add("--evaluation", **files, help="JSON files of `moelpr evaluate`: results, routing and benchmarks per language")
    add("--verification", **files, help="outputs of `moelpr model verify --json`")
    add("--facts", type=Path, metavar="FILE", help="facts to add: YAML or JSON mapping of title to {name: value}")
    add("--output", type=Path, metavar="DIR", help="folder to write to (default: the last RUN)")
    return parser


def live_parser() -> argparse.ArgumentParser:
    parser = CommandParser(
        prog=program_name("python -m moelpr.measure.report") + " live",
        description="Follow a run until it is finished. Ctrl-C leaves; the run continues.",
    )
    add = parser.add_argument
    add("run", type=Path, metavar="RUN", help="run folder (--save of the trainer)")
    add("--interval", type=float, default=2.0, metavar="SECONDS", help="refresh interval in seconds (default: 2)")
    add("--once", action="store_true", help="show the current state and exit")
    return parser


if __name__ == "__main__":
    run_command(main)
