"""Send to trackers what they lack of a run: metrics of all stages, settings, results and files.

moelpr track runs/stage1 runs/stage2 --results runs/evaluation/results.json --files runs/report.html \\
    --mlflow-experiment greek

A training with the same flags sends its metrics by itself. What a tracker has already is not sent again.
"""

from collections.abc import Iterator
from pathlib import Path
from typing import Annotated, Any

from moelpr.base import records
from moelpr.base.errors import UserError, first_line
from moelpr.base.files import temporary_folder, write_text
from moelpr.base.settings import POSITIONAL, File, Flags, Folder
from moelpr.train.track.trackers import TRACKERS, make_trackers, missing_packages, redact
from moelpr.train.track.tracking import TrackedRun, send_backlog, tracked_folders

_TEXT = (".html", ".json", ".md", ".svg", ".txt", ".yaml")


class Settings(Flags):
    runs: Annotated[list[Path], POSITIONAL]  # run folder (--save), in the order of training
    results: list[File] = []  # results.json and harness.json of moelpr evaluate
    files: list[File] = []  # pictures, pages and other files, or folders of them; without credentials and hosts
    tracker_run: File | None = None  # record of the run (default: tracker.json in the last RUN)
    wandb_project: str | None = None  # project of Weights & Biases
    wandb_entity: str | None = None  # its user or team
    wandb_exp_name: str | None = None  # name that it shows (default: the ID of the run)
    wandb_save_dir: Folder | None = None  # folder for its files (default: that of --tracker-run)
    mlflow_experiment: str | None = None  # experiment of MLflow, at the server of MLFLOW_TRACKING_URI


def main(args: Settings) -> None:
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
    with temporary_folder("moelpr-track") as copies:
        for path in args.files:
            _copy(path, copies)
        for tracker in make_trackers(args, run.run, file.parent):
            try:
                tracker.results(results, max(send_backlog(tracker, run, file.parent).values(), default=0) + 1)
                tracker.files(copies)
                tracker.finish()
            except Exception as error:  # a client has errors of many kinds
                raise UserError(
                    f"{tracker.name} does not take run {run.run} ({redact(first_line(error))}); run this command again "
                    "when it does"
                ) from error
            print(f"{tracker.name}: run {run.run}, {len(results)} results, {sum(1 for _ in copies.rglob('*.*'))} files")


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
