"""The whole job on real text: corpus -> dense base -> upcycle -> stage 1 -> stage 2 -> Hugging Face -> report.

    make demo            (python -m examples.demo --run runs/demo)

Every task is a command that you could paste into a shell; it is printed before it runs. What it prints is kept in
`<run>/logs/`. Finished tasks are skipped, so rerun the demo to resume it.
"""

import os
import shutil
from dataclasses import replace
from pathlib import Path
from typing import Any

from examples.demo_claims import judge, read_checks
from examples.demo_tasks import (
    COPIES,
    NUM_NEW_EXPERTS,
    ROOT,
    TOPK,
    Words,
    convert,
    evaluate,
    export,
    gpus_of_pytorch,
    num_ranks,
    preprocess,
    train,
)
from examples.languages import GROUPS, LANGUAGES, held_out_files
from moelpr.base import records
from moelpr.base.command import CommandParser, run_command
from moelpr.measure.report.page import Table, terminal_table
from moelpr.project.file import ProjectFile, parse_project
from moelpr.project.resolved import ResolvedProject
from moelpr.project.steps.steps import STEPS
from moelpr.project.workflow.task import Task
from moelpr.project.workflow.workflow import Workflow

# Model in the evaluation -> run folder.
MODELS = {"base": "base", "full_finetune": "full-finetune", "stage1": "stage1", "stage2": "stage2"}
PROJECT = Path("examples/demo.yaml")
# The base saw a little text of the expanded languages, as real bases have.
BASE_BLEND = {"original": 10, "expanded": 1}
SEED = 1


def main() -> None:
    parser = CommandParser(description=__doc__.splitlines()[0])
    add = parser.add_argument
    add("--run", type=Path, default=Path("runs/demo"), help="output folder (default: %(default)s)")
    add("--cache", type=Path, help="folder for the downloaded corpus (default: ~/.cache/moelpr)")
    add("--overwrite", action="store_true", help="delete an existing run and start from scratch")
    add("--seed", type=int, default=SEED, metavar="N", help="random seed of both stages (default: %(default)s)")
    args = parser.parse_args()
    os.chdir(ROOT)
    if args.overwrite:
        shutil.rmtree(args.run, ignore_errors=True)
    run = args.run
    tasks = [
        *data(run, args.cache),
        *base(run),
        *two_stages(run, args.seed),
        evaluate(run, "text", MODELS, "--continuations", "40"),
        evaluate(run, "routing", {model: MODELS[model] for model in ("stage1", "stage2")}),
        report_task(run),
    ]
    Workflow(run, tasks).run()
    print_report(run)


def data(run: Path, cache: Path | None) -> list[Task]:
    """Real text in six languages, an untrained model with a tokenizer for all, one tagged corpus per language group."""
    corpus, untrained = run / "corpus", run / "untrained-hf"
    download: Words = ["-m", "examples.demo_corpus", "--output", corpus, "--overwrite"]
    download += ["--cache", cache] if cache else []
    files = {language: corpus / f"train.{language}.jsonl" for language in LANGUAGES}
    words: Words = ["examples/demo_base.py", "--input", *files.values(), "--save", untrained, "--overwrite"]
    tasks = [
        Task(name="corpus", command=download, is_complete=corpus.is_dir),
        Task(name="untrained", command=words, made_from=("corpus",), is_complete=untrained.is_dir),
    ]
    return tasks + [
        preprocess(run / "data" / group, [files[language] for language in languages], untrained)
        for group, languages in GROUPS.items()
    ]


def base(run: Path) -> list[Task]:
    """A dense Qwen2, trained from scratch with the same trainer and exported as if it had been downloaded.

    And the usual alternative: all parameters of this base trained on the text of stage 1, for as many tokens.
    """
    return [
        convert(run / "untrained", run / "untrained-hf", made_from=("untrained",)),
        *train(run, "base", run / "untrained", BASE_BLEND),
        convert(run / "dense", run / "base-hf", made_from=("export-base",)),
        *train(run, "full-finetune", run / "dense", {"expanded": 1}),
    ]


def two_stages(run: Path, seed: int) -> list[Task]:
    """Upcycle, post-pretrain and review, as examples/demo.yaml says; export both stages; verify three conversions."""
    hf = run / "base-hf"
    project = ResolvedProject(project_file(run, seed))
    upcycle, stage1, stage2 = (task for name in ("convert", "stage1", "stage2") for task in STEPS[name].tasks(project))
    expanded, original = (f"preprocess-{group}" for group in ("expanded", "original"))
    experts = f"--num-new-experts {NUM_NEW_EXPERTS} --topk {TOPK} --original-copies {COPIES}".split()
    memory = "--gpus 2 --gpu-memory-gib 8 --seq-length 128".split()
    plan: Words = ["moelpr", "layouts", "--hf-path", hf, *experts, *memory]
    upcycled = run / "upcycled"
    texts: Words = ["--text", *held_out_files(run / "corpus").values()]

    def check(what: str, *words: str | Path, made_from: tuple[str, ...]) -> Task:
        return Task(name=f"check-{what}", command=["moelpr", "model", "verify", "--json", *words], made_from=made_from)

    return [
        Task(name="plan", command=plan, made_from=("export-base",)),
        replace(upcycle, made_from=("export-base",)),
        check("upcycled", "--frozen", hf, upcycled, *texts, made_from=("export-base", "convert", "corpus")),
        replace(stage1, made_from=("convert", expanded), environment=gpus_of_pytorch()),
        export(run / "stage1"),
        replace(stage2, made_from=("stage1", original, expanded), environment=gpus_of_pytorch()),
        export(run / "stage2"),
        check("frozen", "--frozen", hf, run / "stage2-hf", made_from=("export-base", "export-stage2")),
        check("export", run / "stage2", run / "stage2-hf", *texts, made_from=("stage2", "export-stage2", "corpus")),
    ]


def project_file(run: Path, seed: int) -> ProjectFile:
    """The content of examples/demo.yaml for this folder, seed and machine."""
    text = PROJECT.read_text(encoding="utf-8").replace("runs/demo", str(run)).replace("seed: 1", f"seed: {seed}")
    return parse_project(text.replace("nproc-per-node: 2", f"nproc-per-node: {num_ranks()}"), PROJECT)


def report_task(run: Path) -> Task:
    """The report of everything."""
    words: Words = ["moelpr", "report", *(run / folder for folder in MODELS.values())]
    words += ["--evaluation", run / "evaluation" / "results.json"]
    words += ["--output", run]
    made_from = (*MODELS.values(), "evaluate", "evaluate-routing")
    return Task(name="report", command=words, made_from=made_from, is_complete=(run / "report.html").is_file)


def print_report(run: Path) -> None:
    """Print the report's numbers in short."""
    numbers = records.read(dict[str, Any], run / "report.json", "remove it, and run make demo again")
    rows = [
        [language, *(f"{numbers['bits_per_byte'][model][language]['value']:.3f}" for model in MODELS)]
        for language in numbers["languages"]
    ]
    print(f"\n{terminal_table(Table(['bits per byte (lower is better)', *MODELS], rows))}\n")
    judgments = [*judge(numbers, read_checks(run))]
    print(f"{sum(judgment.ok for judgment in judgments)} of {len(judgments)} claims are shown")
    for name, language, claim, measured, is_shown in judgments:
        if not is_shown:
            print(f"  not shown: {language or name}: {measured}; claim: {claim}")
    print(f"\nreport: {run / 'report.html'}")


if __name__ == "__main__":
    run_command(main)
