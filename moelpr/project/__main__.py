"""From text to a Hugging Face model that speaks more languages, from one file: init, plan, run and status.

    moelpr init --model Qwen/Qwen3-8B-Base --expanded el=el.jsonl --original en=en.jsonl >languages.yaml
    moelpr plan languages.yaml
    moelpr run languages.yaml

Rerun `moelpr run` to resume after anything; after an edit of the file, it says what it does again, and why.
"""

import argparse
import json
import shlex
import subprocess
import sys
from pathlib import Path

from moelpr.base.command import CommandParser, run_command
from moelpr.project import tables
from moelpr.project.file import schema
from moelpr.project.reading import read_project
from moelpr.project.resolved import ResolvedProject
from moelpr.project.running import SUBMIT, run, run_task
from moelpr.project.steps.steps import STEPS, check_flags, workflow_of
from moelpr.project.steps.training import check_words
from moelpr.project.template import template


def main() -> None:
    args = _parser().parse_args()
    if args.command == "init":
        print(json.dumps(schema(), indent=2) if args.schema else template(args.model, args.expanded, args.original))
        return
    project = ResolvedProject(read_project(args.file))
    if args.command == "plan":
        check_flags(project.file, project.content.steps)
        print(tables.plan(project))
        for stage in project.stages if args.check else ():
            _check(project, stage)
    elif args.command == "status":
        print(tables.status(project))
    elif args.task:
        run_task(workflow_of(project), args.task, args.made_as)
    else:
        run(project, args.redo, args.on, is_dry=args.dry_run, render_only=args.render_only)


def _parser() -> argparse.ArgumentParser:
    parser = CommandParser(prog="moelpr", description=__doc__)
    commands = parser.add_subparsers(dest="command", required=True)
    init = commands.add_parser("init", help="print a commented languages.yaml")
    add = init.add_argument
    add("--model", default="Qwen/Qwen3-0.6B-Base", metavar="DIR", help="the base: directory or Hub name")
    pair = "language code and its text; repeat for several"
    add("--expanded", action="append", type=_language, metavar="LANG=FILE", help=f"language to add: {pair}")
    add("--original", action="append", type=_language, metavar="LANG=FILE", help=f"language to keep: {pair}")
    add("--schema", action="store_true", help="print the JSON schema of the file instead, for editors")
    for name, text in (
        ("plan", "show the steps with time, GPU hours, memory and disk; start nothing"),
        ("status", "show what is done, and when the rest will be"),
        ("run", "run all steps that are not done"),
    ):
        command = commands.add_parser(name, help=text, description=f"{text[0].upper()}{text[1:]}.")
        command.add_argument("file", type=Path, metavar="languages.yaml", help="the file; moelpr init prints one")
        if name == "plan":
            check = "also run each stage without a GPU, as some ranks of the cluster (moelpr check; half a minute each)"
            command.add_argument("--check", action="store_true", help=check)
    add = command.add_argument
    trainings = [name for name, step in STEPS.items() if step.tool.startswith("train")]
    redo = "training to start again after an edit, with those after it; what they had is kept in STAGE.before-1"
    add("--redo", choices=trainings, metavar="STAGE", help=redo)
    where = "this machine, or a cluster, to which all steps are submitted (default: %(default)s)"
    add("--on", choices=("local", *SUBMIT), default="local", help=where)
    add("--render-only", action="store_true", help="write the files for the cluster of --on, but submit nothing")
    add("--dry-run", action="store_true", help="print the steps and their commands; start, submit and write nothing")
    add("--task", metavar="NAME", help="do only this step, on this node of a cluster")
    add("--made-as", metavar="ID", help=argparse.SUPPRESS)
    return parser


def _check(project: ResolvedProject, stage: str) -> None:
    """Run `moelpr check` of a stage.

    Raises:
        SystemExit: It failed; the code is its own.
    """
    words = check_words(project, stage)
    print(f"\n{stage}: {shlex.join(words)}\n", flush=True)
    if code := subprocess.run([sys.executable, "-m", *words]).returncode:
        sys.exit(code)


def _language(text: str) -> tuple[str, str]:
    code, _, path = text.partition("=")
    if not code or not path:
        raise argparse.ArgumentTypeError(f"expected LANG=FILE, such as el=el.jsonl, got {text!r}")
    return code, path


if __name__ == "__main__":
    run_command(main)
