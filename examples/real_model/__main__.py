"""Every setting on a real pretrained model and real text: the queue behind docs/results.md.

    make results            (python -m examples.real_model --run runs/real-model)

Each task is a command, printed before it runs. Finished tasks are skipped and interrupted trainings continue, so rerun
it to resume. A task is done again if its command has changed, or what it reads was made again; outputs that were
removed are restored when a task needs them. What is done so far becomes RUN/real-model.json, .md and .svg.
"""

import math
import os
from pathlib import Path

from checkpoint_convert.hf.safetensors_reader import HfReader
from examples.real_model.page import write_results
from examples.real_model.queue import Queue
from examples.real_model.settings import ALL, PLAIN_SHARE, SHORT, SHORT_TOKENS, TOKENS
from examples.tasks import ROOT
from moelpr.base.command import CommandParser, run_command
from moelpr.base.errors import MachineError, UserError
from moelpr.base.files import locked, make_folder, write_text
from moelpr.model.families.hf_config import CONFIG_FILE, read_config
from moelpr.project.workflow.outlay import check_machine, listing
from moelpr.project.workflow.workflow import Workflow

# The default base has so many; others need more or less in proportion.
DEFAULT_PARAMETERS = 134_515_008
LOCK_FILE = ".lock"
SPARE_DISK_GIB = 5  # needed while a checkpoint replaces another one


def main() -> None:
    parser = CommandParser(description=__doc__.splitlines()[0])
    add = parser.add_argument
    add("--run", type=Path, default=Path("runs/real-model"), metavar="DIR", help="output folder (default: %(default)s)")
    base = "Hugging Face directory (default: SmolLM2-135M-Instruct, which is downloaded)"
    add("--base", type=Path, metavar="DIR", help=base)
    tokens = "tokens of stage 1, full fine-tuning and LoRA; other stages in proportion (default: 163,840)"
    add("--tokens", type=int, metavar="N", help=tokens)
    short = f"a trial in less than three hours: {SHORT_TOKENS:,} tokens, no search for learning rates, and only the "
    short += f"evaluation of unseen text (without --only: {', '.join(SHORT)})"
    add("--short", action="store_true", help=short)
    plain = (
        f"train the base on plain text first, {PLAIN_SHARE:g} times --tokens (languages of the replay text, half of "
    )
    plain += "the unseen ones, and code)"
    add("--plain", action="store_true", help=plain)
    usual, extra = ([setting.name for setting in ALL.values() if setting.is_extra == x] for x in (False, True))
    only = f"settings to train (default: {', '.join(usual)}; others: {', '.join(extra)})"
    add("--only", nargs="+", choices=list(ALL), metavar="NAME", help=only)
    add("--list", action="store_true", help="list the tasks, whether they are done, and their time; start nothing")
    args = parser.parse_args()
    os.chdir(ROOT)
    tokens = args.tokens if args.tokens is not None else SHORT_TOKENS if args.short else TOKENS
    if tokens < 1:
        raise UserError(f"--tokens must be positive, got {tokens}")
    if args.base is not None:
        read_config(args.base)
    queue = Queue(args.run, args.base, tokens, args.short, args.plain)
    names = set(args.only or (SHORT if args.short else usual))
    run = Workflow(args.run, queue.tasks())
    chosen = [task for task in run.tasks.values() if task.tags & names]
    if args.list:
        print(listing(run, chosen))
        return
    make_folder(args.run)
    with locked(args.run / LOCK_FILE, args.run):
        check_same_settings(queue)
        scale = (num_parameters(queue.base) or DEFAULT_PARAMETERS) / DEFAULT_PARAMETERS
        remedy = "choose settings with --only"
        check_machine(run, chosen, scale=scale, spare_disk_gib=SPARE_DISK_GIB, remedy=remedy)
        errors = run.run(chosen, keep_going=True)
        try:
            write_results(args.run)
            print(f"\nresults: {args.run / 'real-model.md'}")
        except UserError as error:  # something is missing, for the reason of the task that failed
            errors = errors or [error]
    if errors:
        kind = MachineError if any(isinstance(error, MachineError) for error in errors) else UserError
        raise kind("\n- ".join(["not everything could be measured:", *map(str, errors)]))


def check_same_settings(queue: Queue) -> None:
    """A folder belongs to one base and one number of tokens."""
    record = queue.run / "queue.txt"
    flags = f"{' --short' * queue.is_short}{' --plain' * queue.is_plain}"
    text = f"--base {queue.given} --tokens {queue.tokens}{flags}\n"
    before = record.read_text(encoding="utf-8", errors="replace") if record.is_file() else text
    if before.strip() != text.strip():
        raise UserError(
            f"--run {queue.run} was started with {before.strip()}, not with {text.strip()}; pass another --run"
        )
    write_text(record, text)


def num_parameters(base: Path) -> int:
    """The number of parameters of a Hugging Face directory; 0 if it is not there yet."""
    if not (base / CONFIG_FILE).is_file():
        return 0
    reader = HfReader(base)
    return sum(math.prod(reader.shape(name)) for name in reader.names)


if __name__ == "__main__":
    run_command(main)
