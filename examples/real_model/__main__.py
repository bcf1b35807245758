"""Every setting on a real pretrained model and real text: the queue behind docs/results.md.

    make results            (python -m examples.real_model --run runs/real-model)

Each step is a command, printed before it runs. Finished steps are skipped and interrupted trainings continue, so rerun
it to resume. A step is done again if its command has changed, or what it reads was made again; outputs that were
removed are restored when a step needs them. What is done so far becomes RUN/real-model.json, .md and .svg;
`python -m examples.real_model.results` puts them into the documentation.
"""

import math
import os
import shutil
from collections.abc import Sequence
from pathlib import Path

from checkpoint_convert.hf.safetensors_reader import HfReader
from examples.real_model.page import write_results
from examples.real_model.settings import ALL, TOKENS
from examples.real_model.task import Task
from examples.real_model.tasks import Tasks
from examples.steps import ROOT, Steps
from moelpr.families.families import CONFIG_FILE, read_config
from moelpr.process import machine
from moelpr.process.command import CommandParser, run_command
from moelpr.process.errors import MachineError, UserError
from moelpr.report.page import Table, terminal_table
from moelpr.store.files import locked, make_folder, write_text

DEFAULT_PARAMETERS = 134_515_008  # of the default base; others need more or less in proportion
LOCK_FILE = ".lock"
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
    if args.tokens < 1:
        raise UserError(f"--tokens must be positive, got {args.tokens}")
    if args.base is not None:
        read_config(args.base)
    tasks = Tasks(args.run, args.base, args.tokens)
    names = set(args.only or usual)
    chosen = [task for task in tasks.all() if task.settings & names]
    run = Steps(args.run)
    if args.list:
        print(list_of(chosen, run))
        return
    make_folder(args.run)
    with locked(args.run / LOCK_FILE, args.run):
        check_same_settings(args.run, tasks)
        check_machine([task for task in chosen if not run.is_done(task.name)], tasks.base, args.run)
        errors = run_tasks(chosen, run, tasks.all())
        try:
            write_results(args.run)
            print(f"\nresults: {args.run / 'real-model.md'}")
        except UserError as error:  # of what is there, which has a reason if a step has failed
            errors = errors or [error]
    if errors:
        kind = MachineError if any(isinstance(error, MachineError) for error in errors) else UserError
        raise kind("\n- ".join(["not everything could be measured:", *map(str, errors)]))


def run_tasks(tasks: Sequence[Task], run: Steps, others: Sequence[Task] = ()) -> list[UserError | MachineError]:
    """Run tasks in order, and return what failed.

    The later tasks of a setting of which one has failed are left out, and so is what only reads a failed task's output.

    Args:
        others: tasks of which only what is read, and was removed, is made again.
    """
    by_name = {task.name: task for task in (*others, *tasks)}
    read_by_others = {name for task in tasks for name in (*task.made_from, *task.after)}
    failed_settings: set[str] = set()
    failed_tasks: set[str] = set()
    errors: list[UserError | MachineError] = []

    def restore_what_is_read(task: Task) -> None:
        for name in (*task.made_from, *task.after):
            if (other := by_name.get(name)) and run.is_done(name) and not is_complete(other):
                perform(other, restore=True)

    def perform(task: Task, restore: bool = False) -> None:
        try:
            command = task.command()
        except UserError:
            restore_what_is_read(task)
            command = task.command()
        is_current = run.is_current(task.name, command, task.made_from, task.files)
        # Other tasks ask for the output that they read.
        again = is_current and (restore or (task.name not in read_by_others and not is_complete(task)))
        if again or not is_current:
            restore_what_is_read(task)
        run.step(
            task.name,
            *command,
            made_from=task.made_from,
            files=task.files,
            is_complete=task.is_complete,
            continues=task.continues,
            again=again,
            **task.variables,
        )

    for task in tasks:
        if not task.settings - failed_settings or (not task.blocks and failed_tasks & {*task.made_from}):
            continue
        try:
            perform(task)
        except (UserError, MachineError) as error:
            errors.append(error)
            failed_tasks.add(task.name)
            failed_settings |= task.settings if task.blocks else set()
            print(error, flush=True)
    return errors


def is_complete(task: Task) -> bool:
    try:
        return task.is_complete()
    except UserError:  # what it is compared with is gone too
        return False


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
    before = record.read_text(encoding="utf-8", errors="replace").strip() if record.is_file() else text.strip()
    if before != text.strip():
        raise UserError(f"--run {run} was started with {before}, not with {text.strip()}; pass another --run")
    write_text(record, text)


def check_machine(tasks: Sequence[Task], base: Path, run: Path) -> None:
    """Raises MachineError if disk or memory can't hold what the tasks need."""
    if not tasks:
        return
    scale = (num_parameters(base) or DEFAULT_PARAMETERS) / DEFAULT_PARAMETERS
    disk = scale * (sum(task.disk_gib for task in tasks) + SPARE_DISK_GIB) * 2**30
    if (free := shutil.disk_usage(run).free) < disk:
        raise MachineError(
            f"the disk of --run {run} has {machine.format_bytes(free)} free, and the steps that are left need "
            f"{machine.format_bytes(disk)}; free space, or choose settings with --only"
        )
    largest = max(tasks, key=lambda task: task.memory_gib)
    memory = scale * largest.memory_gib * 2**30
    if (free := machine.free_memory()) < memory:
        raise MachineError(
            f"{machine.format_bytes(free)} of memory are free, and step {largest.name} needs "
            f"{machine.format_bytes(memory)}; use a larger machine, or choose settings with --only"
        )


def num_parameters(base: Path) -> int:
    """Of a Hugging Face directory; 0 if it is not there yet."""
    if not (base / CONFIG_FILE).is_file():
        return 0
    reader = HfReader(base)
    return sum(math.prod(reader.shape(name)) for name in reader.names)


if __name__ == "__main__":
    run_command(main)
