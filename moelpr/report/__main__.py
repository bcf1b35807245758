"""A run's report.

python -m moelpr.report runs/demo
"""

import argparse
from pathlib import Path

from moelpr.errors import run_command


def main() -> None:
    parser = argparse.ArgumentParser(
        prog="python -m moelpr.report",
        description="Build a run's report.html again from its report.json and metrics.jsonl files.",
    )
    parser.add_argument("run_dir", type=Path, metavar="RUN_DIR", help="folder that holds report.json")
    parser.add_argument("--debug", action="store_true", help="show tracebacks")
    args = parser.parse_args()

    from moelpr.report.report import read_report, write_html

    print(write_html(args.run_dir, read_report(args.run_dir)))


if __name__ == "__main__":
    run_command(main)
