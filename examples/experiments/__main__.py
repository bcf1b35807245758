"""The experiments of docs/results.md: train the projects of this folder, and compare those of each base.

    make results            (python -m examples.experiments [NAME ...])

Everything goes to runs/experiments, and the numbers to its results.md. What is done is left out, so run it again to
resume. With --flores, all languages of FLORES-101 are measured, too.
"""

import os
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from examples.demo_tasks import ROOT
from examples.experiments.flores import write_flores
from examples.experiments.text import UNSEEN
from examples.languages import EXPANDED
from moelpr.base import records
from moelpr.base.command import CommandParser, run_command
from moelpr.base.errors import UserError
from moelpr.base.files import write_text
from moelpr.base.languages import language_name
from moelpr.measure.report.evaluation_files import EvaluationFile
from moelpr.measure.report.numbers import Interval, percent
from moelpr.measure.report.page import Table, markdown_table
from moelpr.project.reading import read_project
from moelpr.project.resolved import ResolvedProject

FILES, RUNS = Path("examples/experiments"), Path("runs/experiments")
BASES = {"first": "SmolLM2-135M-Instruct", "second": "The same after training on plain text"}  # folder -> name
MADE: dict[str, list[str]] = {  # folder -> the command that makes it
    "base": ["-m", "examples.experiments.base"],
    "text": ["-m", "examples.experiments.text"],
    "kept": ["-m", "examples.other_text", "--without", ",".join(UNSEEN)],
}
# Some texts have megabytes.
COMPARED = "--dtype bfloat16 --skip-tokens 32 --max-documents 5".split()
SENTENCES = 40  # per language of FLORES
RELATIVES = ("fi", "et", "az", "uz", "kk")
GROUPS = {"expanded": "learned", "kept": "kept text", "other": "unseen languages and code"}


def main() -> None:
    parser = CommandParser(description=__doc__.splitlines()[0])
    parser.add_argument("names", nargs="*", metavar="NAME", help="files to train, such as lora (default: all)")
    parser.add_argument("--flores", type=Path, metavar="DIR", help="folder of FLORES-101, with dev/eng.dev")
    args = parser.parse_args()
    names, source = args.names, args.flores and args.flores.resolve()
    os.chdir(ROOT)
    files = {
        base: [file for file in sorted((FILES / base).glob("*.yaml")) if file.stem in names or not names]
        for base in BASES
    }
    if unknown := {*names} - {file.stem for its in files.values() for file in its}:
        raise UserError(f"there is no {min(unknown)}.yaml in {FILES}/{'|'.join(BASES)}; pass names of files there")
    if source and not (RUNS / "flores").exists():
        write_flores(source, RUNS / "flores")
    for name, words in MADE.items():
        if not (RUNS / name).exists():
            run(*words, "--output", RUNS / name)
    for base, its in files.items():
        for file in [*([FILES / "second-base.yaml"] if its and base == "second" else []), *its]:
            run("-m", "moelpr", "run", file)
    tables = [f"## {BASES[base]}\n\n{comparison(base, its)}\n" for base, its in files.items() if its]
    if source:
        tables += [f"## {BASES[base]}, FLORES-101\n\n{flores(base, its)}\n" for base, its in files.items() if its]
    write_text(RUNS / "results.md", "\n".join(["# Experiments\n", *tables]))
    print(f"\nresults: {RUNS / 'results.md'}")


def run(*words: str | Path) -> None:
    """Run a command with this Python; end with its code if it fails."""
    print(f"python {' '.join(map(str, words))}", flush=True)
    if code := subprocess.run([sys.executable, *map(str, words)]).returncode:
        sys.exit(code)


def comparison(base: str, files: Sequence[Path]) -> str:
    """Compare the projects of a base, and return the table and the picture as Markdown."""
    output, texts = RUNS / base / "comparison", {f"interface.{one}": f"interface.{one}" for one in UNSEEN}
    texts |= {"python": "code", "sums": "sums"}  # code is a name of the kept text
    data = [word for name, file in texts.items() for word in ("--data", f"{name}={RUNS / 'text' / file}.jsonl")]
    run("-m", "moelpr", "compare", *files, *data, *COMPARED, "--output", output)
    results = records.read(dict[str, Any], output / "compare.json", "remove it, and run make results again")
    rows = [
        [name]
        + [Interval(**project["means"][group]["change"]).text(percent) for group in GROUPS]
        + [Interval(**project["means"][group]["distance"]).text("{:.3f}".format) for group in GROUPS]
        for name, project in results["projects"].items()
    ]
    head = ["change of bits per byte", *GROUPS.values(), *(f"KL, {name}" for name in GROUPS.values())]
    return f"{markdown_table(Table(head, rows))}\n\n![Learned and lost]({base}/comparison/compare.svg)"


def flores(base: str, files: Sequence[Path]) -> str:
    """Measure the projects of a base in all languages of FLORES, and return the table as Markdown."""
    output, projects = RUNS / base / "flores", {file.stem: ResolvedProject(read_project(file)) for file in files}
    dense = next(iter(projects.values())).base
    texts = {file.stem.removeprefix("flores."): file for file in sorted((RUNS / "flores").glob("*.jsonl"))}
    models = {"base": dense} | {name: project.export for name, project in projects.items()}
    words = [word for name, path in models.items() for word in ("--model", f"{name}={path}")]
    words += [word for name, path in texts.items() for word in ("--data", f"{name}={path}")]
    words += ["--original-languages", ",".join(sorted(texts.keys() - {*EXPANDED})), "--dtype", "bfloat16"]
    words += ["--max-documents", str(SENTENCES), "--base", str(dense), "--output", str(output)]
    run("-m", "moelpr", "evaluate", "text", *words)
    rows = []
    for name, of in EvaluationFile.read(output / "results.json").models.items():
        if name in projects:
            changes = {text: one.change["bits_per_byte"].value for text, one in of.languages.items()}
            learned, others = (of.means[f"mean {group}"] for group in ("expanded", "original"))
            worst = sorted(changes.keys() - {*EXPANDED}, key=lambda text: -changes[text])[:3]
            rows.append(
                [name, learned.change["bits_per_byte"].text(percent), others.change["bits_per_byte"].text(percent)]
                + [others.distance.text("{:.3f}".format) if others.distance else "\u2013"]
                + [
                    ", ".join(f"{language_name(text)} {percent(changes[text])}" for text in its)
                    for its in (worst, RELATIVES)
                ]
            )
    head = ["change of bits per byte", "learned", f"{len(texts) - len(EXPANDED)} other languages", "their KL"]
    return markdown_table(Table([*head, "worst", "relatives"], rows))


if __name__ == "__main__":
    run_command(main)
