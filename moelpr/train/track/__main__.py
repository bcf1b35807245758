"""Send to trackers what they lack of a run: metrics of all stages, settings, results and files.

moelpr track runs/stage1 runs/stage2 --results runs/evaluation/results.json --files runs/report.html \\
    --mlflow-experiment greek

A training with the same flags sends its metrics by itself. What a tracker has already is not sent again.
"""

import argparse
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from moelpr.base import records
from moelpr.base.command import CommandParser, program_name, run_command
from moelpr.base.errors import UserError, first_line
from moelpr.base.files import write_text
from moelpr.train.track.trackers import TRACKERS, make_trackers, missing_packages, redact
from moelpr.train.track.tracking import TrackedRun, send_backlog, tracked_folders

_TEXT = (".html", ".json", ".md", ".svg", ".txt", ".yaml")


def main() -> None:
    args = _parser().parse_args()
    file = args.tracker_run or args.runs[-1] / TrackedRun.FILE_NAME
    if not any(getattr(args, flag) for flag in TRACKERS):
        raise UserError(f"no tracker is given; pass {', '.join(f'--{flag.replace("_", "-")}' for flag in TRACKERS)}")
    if missing := missing_packages(args):
        raise UserError(missing[0])
    results: dict[str, float] = {}
    for path in args.results:
        content = records.read(dict[str, Any], path, "pass files that `moelpr evaluate` wrote as --results")
        results |= {f"{path.stem}/{key}": value for key, value in _numbers(content.get("models", {}))}
    run = tracked_folders(args.runs, file)
    with tempfile.TemporaryDirectory() as temporary:
        copies = Path(temporary)
        for path in args.files:
            _copy(path, copies)
        for tracker in make_trackers(args, run.run, file.parent):
            try:
                sent = send_backlog(tracker, run, file.parent)
                tracker.results(results, max(sent.values(), default=0) + 1)
                tracker.files(copies)
                tracker.finish()
            except Exception as error:  # a client has errors of many kinds
                raise UserError(
                    f"{tracker.name} does not take run {run.run} ({redact(first_line(error))}); run this command again "
                    "when it does"
                ) from error
            print(f"{tracker.name}: run {run.run}, {len(results)} results, {sum(1 for _ in copies.rglob('*.*'))} files")


def _parser() -> argparse.ArgumentParser:
    parser = CommandParser(prog=program_name("python -m moelpr.train.track"), description=__doc__)
    add = parser.add_argument
    add("runs", nargs="+", type=Path, metavar="RUN", help="run folder (--save), in the order of training")
    results: dict[str, Any] = {"nargs": "+", "type": Path, "default": [], "metavar": "FILE"}
    add("--results", **results, help="results.json and harness.json of moelpr evaluate")
    add("--files", **results, help="pictures, pages and other files, or folders of them; without credentials and hosts")
    add("--tracker-run", type=Path, metavar="FILE", help="record of the run (default: tracker.json in the last RUN)")
    add("--wandb-project", metavar="NAME", help="project of Weights & Biases")
    add("--wandb-entity", metavar="NAME", help="its user or team")
    add("--wandb-exp-name", metavar="NAME", help="name that it shows (default: the ID of the run)")
    add("--wandb-save-dir", metavar="DIR", help="folder for its files (default: that of --tracker-run)")
    add("--mlflow-experiment", metavar="NAME", help="experiment of MLflow, at the server of MLFLOW_TRACKING_URI")
    return parser


def _numbers(content: Any, path: str = "") -> Iterator[tuple[str, float]]:
    """The values of estimates in results: their keys, joined by slashes, and numbers."""
    for key, item in content.items() if isinstance(content, dict) else ():
        name = f"{path}/{key}".lstrip("/")
        if isinstance(item, dict) and isinstance(item.get("value"), int | float):
            yield name, float(item["value"])
        yield from _numbers(item, name)


def _copy(path: Path, folder: Path) -> None:
    """Copy text files, those in a folder too, without credentials and hosts."""
    if not path.exists():
        raise UserError(f"--files {path} is not there; pass files or folders")
    for source in sorted(path.glob("*")) if path.is_dir() else [path]:
        if source.suffix in _TEXT and source.is_file():
            name = Path(path.name, source.name) if path.is_dir() else Path(source.name)
            (folder / name).parent.mkdir(exist_ok=True)
            write_text(folder / name, redact(source.read_text()))


if __name__ == "__main__":
    run_command(main)
