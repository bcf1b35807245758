"""From text to a Hugging Face model that speaks more languages, from one file: init, plan, run, status and demo."""

import argparse
import json
import shlex
import subprocess
import sys
from pathlib import Path
from typing import Annotated

from moelpr.base.errors import UserError
from moelpr.base.languages import canonical, check_name, is_code
from moelpr.base.quantities import as_argument, parse_bytes
from moelpr.base.settings import POSITIONAL, REPEATED, Flags, Folder, choices, either, metavar
from moelpr.project import tables
from moelpr.project.budget import check_budget
from moelpr.project.file import schema
from moelpr.project.reading import check_name_of_model, read_project
from moelpr.project.resolved import ResolvedProject
from moelpr.project.running import SUBMIT, run_here, run_task, show, submit
from moelpr.project.steps.steps import workflow_of
from moelpr.project.steps.training import check_words
from moelpr.project.template import template
from moelpr.project.toy import write_toy


def _language(text: str, form: str = "LANG=FILE, such as el=el.jsonl") -> tuple[str, str]:
    code, _, path = text.partition("=")
    if not code or not path:
        raise argparse.ArgumentTypeError(f"expected {form}, got {text!r}")
    return code, path


_Pairs = Annotated[list[tuple[str, str]], REPEATED, {"type": _language, "metavar": "LANG=FILE"}]


def _assumed(text: str) -> tuple[str, int]:
    code, size = _language(text, "LANG=SIZE, such as el=8GB")
    if size.strip().isdigit():
        raise argparse.ArgumentTypeError(f"expected LANG=SIZE with a unit, such as {code}={size}GB, got {text!r}")
    return code, as_argument(parse_bytes)(size)


class Init(Flags):
    model: Annotated[str, metavar("DIR")] = "Qwen/Qwen3-0.6B-Base"  # the base: directory or Hub name
    expanded: _Pairs = []  # language to add: language code and its text; repeat for several
    original: _Pairs = []  # language to keep: language code and its text; repeat for several
    schema: bool = False  # print the JSON schema of the file instead, for editors


class Project(Flags):
    # the file; moelpr init prints one
    file: Annotated[Path, POSITIONAL, metavar("FILE")] = Path("languages.yaml")

    def project(self) -> ResolvedProject:
        return ResolvedProject(read_project(self.file))


class Plan(Project):
    # size of a language's text, which then need not be there; repeat for several
    assume: Annotated[list[tuple[str, int]], REPEATED, {"type": _assumed, "metavar": "LANG=SIZE"}] = []
    check: bool = False  # also run each stage without a GPU (moelpr check; half a minute each)


class Run(Project):
    # training to start again after an edit, with those after it; the old is kept in STAGE.before-1
    redo: Annotated[str | None, metavar("STAGE")] = None
    on: Annotated[str, choices(["local", *SUBMIT])] = "local"  # this machine, or a cluster, which all steps go to
    render_only: bool = False  # write the files for the cluster of --on, but submit nothing
    # print the steps and their commands; start, submit and write nothing
    dry_run: Annotated[bool, either("steps")] = False
    task: Annotated[str | None, either("steps")] = None  # do only this step, on this node of a cluster
    made_as: str | None = None  # the ID that --task was submitted with


def init(args: Init) -> None:
    """Print a commented languages.yaml.

    moelpr init --model Qwen/Qwen3-8B-Base --expanded el=el.jsonl --original en=en.jsonl >languages.yaml
    """
    for code, path in args.expanded + args.original:
        check_name(code)
        if (code, path) in args.expanded and not is_code(code):
            raise UserError(f"{code}={path}: a language is a code such as el or ell_Grek; correct {code}")
    codes = [canonical(code) for code, _ in args.expanded + args.original]
    if twice := next((code for code in codes if codes.count(code) > 1), None):
        raise UserError(
            f"the language {twice} is given twice; pass it once, with a folder or pattern for several files"
        )
    check_name_of_model(args.model, "--model")
    print(json.dumps(schema(), indent=2) if args.schema else template(args.model, args.expanded, args.original))


def plan(args: Plan) -> None:
    """Show whether it fits, and the steps with time, GPU hours, memory and disk; start nothing."""
    project = ResolvedProject(read_project(args.file, dict(args.assume)))
    check_budget(project)
    print(tables.plan(project))
    for stage in {stage.partition("-")[0]: stage for stage in project.stages}.values() if args.check else ():
        words = check_words(project, stage)
        print(f"\n{stage}: {shlex.join(words)}\n", flush=True)
        if code := subprocess.run([sys.executable, "-m", *words]).returncode:
            sys.exit(code)


def status(args: Project) -> None:
    """Show what is done, and when the rest will be."""
    print(tables.status(args.project()))


def run(args: Run) -> None:
    """Run all steps that are not done.

    Run it again to resume after anything; after an edit of the file, it says what it does again, and why.
    """
    if args.on == "local" and args.render_only:
        raise UserError(
            f"--render-only writes the jobs of a cluster; add --on {'|'.join(SUBMIT)}, or pass --dry-run to see the "
            "commands for this machine"
        )
    if args.made_as and not args.task:
        raise UserError("--made-as is the ID of what --task has made; add --task NAME, or remove it")
    if args.task and args.on != "local":
        raise UserError(
            f"--task does one step on this node, got --on {args.on}; remove --on, or remove --task to submit all"
        )
    project = args.project()
    if args.redo and args.redo not in project.stages:
        raise UserError(f"--redo {args.redo} is no training of {args.file}; it has {', '.join(project.stages)}")
    if args.task:
        run_task(workflow_of(project), args.task, args.made_as)
    elif args.dry_run:
        show(project, args.on, args.redo)
    elif args.on == "local":
        run_here(project, args.redo)
    else:
        submit(project, args.on, args.redo, render_only=args.render_only)


class Demo(Flags):
    output: Folder = Path("moelpr-demo")  # folder of text, base, languages.yaml and all that is made


def demo(args: Demo) -> None:
    """Run a small project on this CPU, without network: two languages of drawn words for a base of 0.3M parameters.

    It shows the way and its files, not what a real base would learn. Run it again to resume.
    """
    path = write_toy(args.output)
    run_here(ResolvedProject(read_project(path)))
    print(f"This is a toy: its words are drawn at random. The file is {path}; moelpr init writes one for your base.")
