"""Every setting on a real pretrained model and real text: the queue behind docs/results.md.

    make results            (python -m examples.real_model --run runs/real-model)

Each step is a command, printed before it runs. Finished steps are skipped and interrupted trainings continue, so rerun
it to resume. What is done so far becomes RUN/real-model.json, .md and .svg; `python -m examples.real_model.results`
puts them into the documentation.
"""

import os
import shutil
from collections.abc import Sequence
from pathlib import Path

from examples.real_model.page import write_results
from examples.real_model.settings import ALL, TOKENS
from examples.real_model.task import Task
from examples.real_model.tasks import Tasks
from examples.steps import ROOT, Steps
from moelpr import machine
from moelpr.command import CommandParser, run_command
from moelpr.errors import MachineError, UserError
from moelpr.files import write_text
from moelpr.report.page import Table, terminal_table

DEFAULT_BASE_BYTES = 538_090_408  # of its weights; other bases need more or less in proportion
SPARE_DISK_GIB = 5  # while a checkpoint replaces another one


def main() -> None:
    parser = CommandParser(description=__doc__.splitlines()[0])
    add = parser.add_argument
    add("--run", type=Path, default=Path("runs/real-model"), metavar="DIR", help="output folder (default: %(default)s)")
    add(
        "--base",
        type=Path,
        metavar="DIR",
        help="Hugging Face directory (default: SmolLM2-135M-Instruct, which is downloaded)",
    )
    tokens = "tokens of stage 1, full fine-tuning and LoRA; other steps in proportion (default: %(default)s)"
    add("--tokens", type=int, default=TOKENS, metavar="N", help=tokens)
    usual, extra = ([setting.name for setting in ALL.values() if setting.is_extra == x] for x in (False, True))
    add("--only", nargs="+", choices=list(ALL), metavar="NAME",
        help=f"settings to train (default: {', '.join(usual)}; others: {', '.join(extra)})")  # fmt: skip
    add("--list", action="store_true", help="list the steps, whether they are done, and their time; start nothing")
    args = parser.parse_args()
    os.chdir(ROOT)
    tasks = Tasks(args.run, args.base, args.tokens)
    names = set(args.only or usual)
    chosen = [task for task in tasks.all() if task.settings & names]
    run = Steps(args.run)
    if args.list:
        print(list_of(chosen, run))
        return
    check_same_settings(args.run, tasks)
    check_machine([task for task in chosen if not is_done(task, run)], tasks.base, args.run)
    failed = run_tasks(chosen, run)
    write_results(args.run)
    print(f"\nresults: {args.run / 'real-model.md'}")
    if failed:
        raise UserError("\n- ".join(["not everything could be measured:", *failed]))


def run_tasks(tasks: Sequence[Task], run: Steps) -> list[str]:
    """Run tasks in order; those of a setting of which one has failed are left out. Returns the messages."""
    failed: set[str] = set()
    messages = []
    for task in tasks:
        wanted = task.settings - failed
        if not wanted:
            continue
        try:
            run.step(task.name, *task.command(), **task.variables)
        except UserError as error:
            messages.append(str(error))
            failed |= task.settings if task.blocks else set()
            print(error, flush=True)
    return messages


def is_done(task: Task, run: Steps) -> bool:
    return task.name in run.wall_times_s()


def list_of(tasks: Sequence[Task], run: Steps) -> str:
    """A table of the tasks, and the time that is left."""
    wall = run.wall_times_s()
    rows = [
        [task.name, "done" if task.name in wall else "", f"{wall.get(task.name, task.minutes * 60) / 60:.0f} min"]
        for task in tasks
    ]
    left = sum(task.minutes for task in tasks if task.name not in wall)
    table = terminal_table(Table(["step", "state", "took, or expected on 2 cores"], rows))
    return f"{table}\n\nleft: about {left / 60:.1f} hours"


def check_same_settings(run: Path, tasks: Tasks) -> None:
    """A folder belongs to one base and one number of tokens."""
    record, text = run / "queue.txt", f"--base {tasks.base} --tokens {tasks.tokens}\n"
    if record.exists() and record.read_text(encoding="utf-8") != text:
        before = record.read_text(encoding="utf-8").strip()
        raise UserError(f"--run {run} was started with {before}, not with {text.strip()}; pass another --run")
    write_text(record, text)


def check_machine(tasks: Sequence[Task], base: Path, run: Path) -> None:
    """Raises MachineError if the disk, UserError if the memory can't hold what the tasks need."""
    if not tasks:
        return
    weights = sum(path.stat().st_size for path in base.glob("*.safetensors")) or DEFAULT_BASE_BYTES
    scale = weights / DEFAULT_BASE_BYTES
    disk = scale * (sum(task.disk_gib for task in tasks) + SPARE_DISK_GIB) * 2**30
    if (free := shutil.disk_usage(run).free) < disk:
        raise MachineError(
            f"the disk of --run {run} has {machine.as_gib(free)} free, and the steps that are left need "
            f"{machine.as_gib(int(disk))}; free space, or choose settings with --only"
        )
    largest = max(tasks, key=lambda task: task.memory_gib)
    memory = scale * largest.memory_gib * 2**30
    if (free := machine.free_memory()) < memory:
        raise UserError(
            f"{machine.as_gib(free)} of memory are free, and step {largest.name} needs {machine.as_gib(int(memory))}; "
            "use a larger machine, or choose settings with --only"
        )


if __name__ == "__main__":
    run_command(main)
