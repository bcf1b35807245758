"""A report of runs, while they go on or afterwards; `live` follows a run on a terminal.

python -m moelpr.report runs/stage1 runs/stage2 --evaluation runs/evaluation.json
python -m moelpr.report live runs/stage1
"""

import argparse
import sys
from pathlib import Path

from moelpr.errors import UserError, run_command


def main() -> None:
    if sys.argv[1:2] == ["live"]:
        from moelpr.report.live import main as follow

        follow(sys.argv[2:])
        return
    parser = argparse.ArgumentParser(
        prog="python -m moelpr.report",
        description="Write report.html and report.md of one run or several, running or finished. "
        "`python -m moelpr.report live RUN` follows a run on a terminal.",
    )
    parser.add_argument(
        "runs", nargs="+", type=Path, metavar="RUN",
        help="folder that --save named, in the order the runs were made; or the demo's folder",
    )  # fmt: skip
    parser.add_argument(
        "--evaluation", nargs="+", type=Path, default=[], metavar="FILE",
        help="JSON files of `python -m moelpr.evaluate`: results per language with intervals, routing per language",
    )  # fmt: skip
    parser.add_argument("--output", type=Path, metavar="DIR", help="folder for the files (default: the last RUN)")
    parser.add_argument("--debug", action="store_true", help="show tracebacks")
    args = parser.parse_args()
    print(build(args.runs, args.evaluation, args.output or args.runs[-1]))


def build(folders: list[Path], evaluations: list[Path], output: Path) -> Path:
    """Write the report's files into `output`; returns the page's path."""
    from moelpr.report.demo import read_report, write_pages
    from moelpr.report.evaluation import read_evaluations
    from moelpr.report.run_document import run_document
    from moelpr.report.runs import read_run
    from moelpr.report.write import write_document

    demos = [folder for folder in folders if (folder / "report.json").exists()]
    if demos and (len(folders) > 1 or evaluations or output != folders[0]):
        raise UserError(f"{demos[0]} is a demo, whose report stands in its own folder; give it alone")
    if demos:
        return write_pages(demos[0], read_report(demos[0]))
    runs = [read_run(folder) for folder in folders]
    return write_document(output, run_document(runs, read_evaluations(evaluations)))


if __name__ == "__main__":
    run_command(main)
