"""The experiments of docs/results.md: train the projects of this folder, and make tables of those of each base.

    make results            (python -m examples.experiments [NAME ...])
    make results RESULTS="first/second-ffn first/full --seeds 3 --flores DIR --table mixed"

Everything goes to runs/experiments, and all tables to its results.md. What is done is left out, so run it again to
resume, also with more names. To export a model again, remove the folder of its training, which has no checkpoints left.
"""

import os
import re
import shutil
import subprocess
import sys
from collections.abc import Mapping, Sequence
from itertools import product
from pathlib import Path

import yaml

from examples.demo_tasks import ROOT
from examples.experiments.flores import TABLES, Sentences, all_languages_chart, read_flores, read_pairs
from examples.experiments.parts import add_switches, measure, without_seed, write_mean
from examples.experiments.routers import ROUTERS
from examples.experiments.text import UNSEEN
from moelpr.base import records
from moelpr.base.command import CommandParser, run_command
from moelpr.base.errors import UserError
from moelpr.base.files import write_text
from moelpr.base.settings import number
from moelpr.data.text.reading import read_documents
from moelpr.measure.report.numbers import finite_json
from moelpr.measure.report.page import markdown_table
from moelpr.project.reading import read_project
from moelpr.project.resolved import ResolvedProject

FILES, RUNS = Path("examples/experiments"), Path("runs/experiments")
BASES = {"first": "SmolLM2-135M-Instruct", "second": "The same after training on plain text", "relatives": "Relatives"}
MADE: dict[str, list[str]] = {  # folder -> the command that makes it
    "base": ["-m", "examples.experiments.base"],
    "text": ["-m", "examples.experiments.text"],
    "kept": ["-m", "examples.other_text", "--without", ",".join(UNSEEN)],
}
# Some texts have megabytes.
COMPARED = "--dtype bfloat16 --skip-tokens 32 --max-documents 5".split()
COMPARE, AGREEMENT = "compare", "agreement"
ROUTED = {FILES / base / f"{name}.yaml": "second-ffn" for base, name in product(("first", "second"), ROUTERS)} | {
    FILES / "first/auto-kept-longer.yaml": "longer",
    FILES / "relatives/auto-kept.yaml": "second-ffn",
}  # other routers → whose FFNs they are for
AVERAGED = {"full-pack", "full-pack-longer"}  # the projects of which the mean with the base is measured, too


def main() -> None:
    parser = CommandParser(description=__doc__.splitlines()[0])
    add = parser.add_argument
    add("names", nargs="*", metavar="NAME", help="files to train, such as lora or first/lora (default: all)")
    add("--flores", type=Path, metavar="DIR", help="folder of FLORES-101, with dev/eng.dev")
    add("--pairs", type=Path, metavar="DIR", help="folder of MultiBLiMP, with tur/data.tsv")
    add("--table", action="append", choices=(COMPARE, *TABLES), help="only this table; repeat for several")
    add("--languages", default="", metavar="A,B", help="languages of the table flores, besides the new ones")
    add(
        "--seeds", default=1, help="orders of the text; flores and mixed have their mean (default: 1)", **number(int, 1)
    )
    args = parser.parse_args()
    sentences: dict[str, Sentences] = {AGREEMENT: read_pairs(args.pairs)} if args.pairs else {}
    if args.flores:
        sentences |= dict.fromkeys(TABLES.keys() - {AGREEMENT}, read_flores(args.flores, args.languages.split(",")))
    tables = args.table or [COMPARE, *(name for name in TABLES if name in sentences)]
    if unread := [name for name in tables if name != COMPARE and name not in sentences]:
        flag = "--pairs" if unread[0] == AGREEMENT else "--flores"
        raise UserError(f"the table {unread[0]} needs the folder of its text; pass {flag} DIR")
    os.chdir(ROOT)
    files = [
        x
        for x in sorted([*FILES.glob("*/*.yaml"), *ROUTED])
        if any(x.match(f"{one}.yaml") for one in args.names or "*")
    ]
    if unknown := [name for name in args.names if not any(file.match(f"{name}.yaml") for file in files)]:
        raise UserError(f"there is no {unknown[0]}.yaml in {FILES}/{'|'.join(BASES)}; pass names of files there")
    for name, words in MADE.items():
        if not (RUNS / name).exists():
            run(*words, "--output", RUNS / name)
    for base, label in BASES.items():
        its = [file for file in files if file.parent.name == base]
        others = {file: file.with_stem(ROUTED[file]) for file in its if file in ROUTED}
        its = sorted({*its, *others.values()} - others.keys())
        seeds = range(1, args.seeds + 1)
        its = [with_seed(file, seed) for file in its for seed in seeds]
        for file in [*([FILES / "second-base.yaml"] if its and base != "first" else []), *its]:
            run("-m", "moelpr", "run", file)
            for step in Path(yaml.safe_load(file.read_text())["output"]).glob("*/iter_*"):
                shutil.rmtree(step)  # gigabytes, which the export has made needless
        for (file, ours), seed in product(others.items(), seeds):
            trained = with_seed(ours, seed)
            its.append(RUNS / base / f"{trained.stem.replace(ours.stem, file.stem)}.yaml")
            write_text(its[-1], trained.read_text().replace(f"/{trained.stem}\n", f"/{its[-1].stem}\n"))
            run("-m", "examples.experiments.routers", trained, its[-1])
        for name in tables if its else ():
            table = comparison(base, its) if name == COMPARE else of_flores(name, base, its, sentences[name])
            training = spent("training", {file.stem: costs()[str(file)] / 60 for file in its})
            write_text(RUNS / base / f"{name}.md", f"## {label}: {table}\n\n{training}\n")
    pages = [file.read_text() for base in BASES for file in sorted((RUNS / base).glob("*.md"))]
    write_text(RUNS / "results.md", "\n".join(["# Experiments\n", *pages]))
    print(f"\nresults: {RUNS / 'results.md'}")


def with_seed(file: Path, seed: int) -> Path:
    """A project with another order of its training text, in the folder of results; the first is the file itself."""
    if seed == 1:
        return file
    project = yaml.safe_load(file.read_text())
    project["output"] += f"-seed{seed}"
    for step in project["steps"].values():
        if "lr" in step:
            step["seed"] = seed
    path = RUNS / file.parent.name / f"{file.stem}-seed{seed}.yaml"
    write_text(path, yaml.safe_dump(project, sort_keys=False))
    return path


def run(*words: str | Path) -> None:
    """Run a command with this Python, and count its CPU time for its last argument; end with its code if it fails."""
    print(f"python {' '.join(map(str, words))}", flush=True)
    before = sum(os.times()[2:4])
    code = subprocess.run([sys.executable, *map(str, words)]).returncode
    seconds, row = costs(), str(words[-1])
    seconds[row] = seconds.get(row, 0) + sum(os.times()[2:4]) - before
    write_text(RUNS / "costs.json", finite_json(seconds))
    if code:
        sys.exit(code)


def costs() -> dict[str, float]:
    """The last argument of a command -> the CPU seconds that it has taken."""
    path = RUNS / "costs.json"
    return records.read(dict[str, float], path, "remove it") if path.exists() else {}


def comparison(base: str, files: Sequence[Path]) -> str:
    """Compare the projects of a base, and return the page, whose headings are of the third level."""
    output, texts = RUNS / base / "comparison", {f"interface.{one}": f"interface.{one}" for one in UNSEEN}
    texts |= {"python": "code"}  # code is a name of the kept text
    data = [word for name, file in texts.items() for word in ("--data", f"{name}={RUNS / 'text' / file}.jsonl")]
    run("-m", "moelpr", "compare", *files, *data, *COMPARED, "--output", output)
    page = (output / "compare.md").read_text().replace("](", f"]({base}/comparison/")
    return "interface texts\n\n" + re.sub("^#", "###", page, flags=re.MULTILINE)


def of_flores(name: str, base: str, files: Sequence[Path], sentences: Sentences) -> str:
    """Measure projects of a base, the means of AVERAGED with the base, and switches; return the table as Markdown."""
    projects = {file.stem: ResolvedProject(read_project(file)) for file in files}
    models = {"base": next(iter(projects.values())).base} | {file: one.export for file, one in projects.items()}
    for tuned in [name for name in projects if without_seed(name) in AVERAGED]:
        mean = models[f"mean of base and {tuned}"] = RUNS / base / f"{tuned}-mean"
        if not mean.exists():
            write_mean(models["base"], models[tuned], mean)
    title, texts_of, table_of = TABLES[name]
    new = [next(iter(projects.values())).expanded] if name == "flores" else []
    texts = texts_of(sentences, read_documents(RUNS / "text" / "code.jsonl"), *new)
    scores, minutes = measure(models, texts, RUNS / base / name)
    add_switches(scores, texts, models["base"])
    if name == "flores":
        write_text(RUNS / base / "flores.svg", all_languages_chart(scores))
    return f"{title}\n\n{markdown_table(table_of(scores))}\n\n{spent('measuring', minutes)}"


def spent(on: str, minutes: Mapping[str, float]) -> str:
    return f"CPU minutes of {on}: {', '.join(f'{name} {number:.0f}' for name, number in minutes.items())}."


if __name__ == "__main__":
    run_command(main)
