"""Write report.html, report.md and report.json of one or several runs, running or finished.

moelpr report runs/stage1 runs/stage2 --evaluation runs/evaluation/results.json
"""

from pathlib import Path
from typing import Annotated

from moelpr.base.settings import POSITIONAL, File, Flags, Folder


class Settings(Flags):
    runs: Annotated[list[Path], POSITIONAL]  # run folder (--save of the trainer), in training's order
    evaluation: list[File] = []  # JSON files of `moelpr evaluate`: results, routing and benchmarks per language
    routers: File | None = None  # calibration.json of a model whose routers were found in closed form
    output: Folder | None = None  # folder to write to (default: the last RUN)


def main(args: Settings) -> None:
    # After the arguments: matplotlib is slow to import.
    from moelpr.measure.report.findings import Calibration
    from moelpr.measure.report.language_results import read_evaluations
    from moelpr.measure.report.run_report import Report
    from moelpr.measure.report.runs import read_runs

    report = Report(
        runs=read_runs(args.runs),
        evaluation=read_evaluations(args.evaluation),
        routers=Calibration.read(args.routers) if args.routers else None,
    )
    print(report.write(args.output or args.runs[-1]))
