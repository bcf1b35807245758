"""The whole job on real text: corpus -> dense base -> upcycle -> stage 1 -> stage 2 -> Hugging Face -> report.

    make demo            (python -m examples.demo --run runs/demo)

Every step is a command that you could paste into a shell; it is printed before it runs. What it prints is kept in
`<run>/logs/`. Finished steps are skipped, so rerun the demo to resume it.
"""

import json
import os
import shutil
from pathlib import Path

from examples import steps
from examples.frontier_results import FILE_NAME, value_range
from examples.steps import COPIES, EXPANDED, NUM_NEW_EXPERTS, ORIGINAL, REVIEW_BLEND, ROOT, TOPK, Steps, convert
from moelpr.languages import language_name
from moelpr.process.command import CommandParser, run_command
from moelpr.report.page import Table, terminal_table
from moelpr.store.files import write_text
from moelpr.store.yaml_files import dump

# Model in the evaluation -> run folder.
MODELS = {"base": "base", "full_finetune": "full-finetune", "stage1": "stage1", "stage2": "stage2"}
VOCABULARY = 4096
BASE_SHAPE = "--hidden-size 256 --num-layers 6 --ffn-hidden-size 768 --num-attention-heads 4 --num-query-groups 2"
# The base saw a little text of the expanded languages, as real bases have.
BASE_BLEND = {"original": 10, "expanded": 1}
SEED = 1
# The setting of this demo in docs/frontier.json, whose numbers over seeds the report shows.
SETTING = "2-copies-gamma-0.1"


def main() -> None:
    parser = CommandParser(description=__doc__.splitlines()[0])
    parser.add_argument("--run", type=Path, default=Path("runs/demo"), help="output folder (default: %(default)s)")
    parser.add_argument("--cache", type=Path, help="folder for the downloaded corpus (default: ~/.cache/moelpr)")
    parser.add_argument("--overwrite", action="store_true", help="delete an existing run and start from scratch")
    parser.add_argument("--seed", type=int, default=SEED, metavar="N",
        help="random seed of both stages (default: %(default)s, the middle one of docs/frontier.json)")  # fmt: skip
    args = parser.parse_args()
    os.chdir(ROOT)
    if args.overwrite:
        shutil.rmtree(args.run, ignore_errors=True)
    demo = Steps(args.run)
    prepare_data(demo, args.cache)
    train_base(demo)
    full_finetune(demo)
    two_stages(demo, args.seed)
    evaluate(demo)
    report(demo)


def prepare_data(demo: Steps, cache: Path | None) -> None:
    """Real text in six languages, a tokenizer for all six, one tagged corpus per language group."""
    run = demo.run
    where = ["--cache", cache] if cache else []
    demo.step("corpus", "examples/demo_corpus.py", "--output", run / "corpus", *where)
    train_files = {name: run / "corpus" / f"train.{name}.jsonl" for name in (*ORIGINAL, *EXPANDED)}
    demo.step(
        "tokenizer",
        *("examples/demo_tokenizer.py", "--input", *train_files.values(), "--output", run / "tokenizer"),
        *("--vocab-size", str(VOCABULARY), "--overwrite"),
        made_from=["corpus"],
    )
    for group, languages in (("original", ORIGINAL), ("expanded", EXPANDED)):
        demo.step(
            f"preprocess-{group}",
            *("data_tools/preprocess_data.py", "--input", *(train_files[name] for name in languages)),
            *("--output-prefix", run / "data" / group, "--tokenizer-type", "HuggingFaceTokenizer"),
            *("--tokenizer-model", run / "tokenizer", "--append-eod", "--language", group),
            *("--workers", "2", "--overwrite"),
            made_from=["corpus", "tokenizer"],
        )


def train_base(demo: Steps) -> None:
    """Train a dense Qwen2 from scratch with the same trainer; its export is used as if it had been downloaded."""
    save = demo.run / "untrained-hf"
    words = ["--tokenizer", demo.run / "tokenizer", "--save", save, *BASE_SHAPE.split(), "--overwrite"]
    demo.step("untrained", "examples/untrained_qwen2.py", *words, made_from=["tokenizer"])
    convert(demo, "convert-untrained", save, demo.run / "untrained", "--dense", made_from=["untrained"])
    train(demo, "base", "dense", "convert-untrained", BASE_BLEND, demo.run / "untrained")


def full_finetune(demo: Steps) -> None:
    """The usual alternative: train all parameters of the base on the text of stage 1, for as many tokens."""
    convert(demo, "convert-dense", demo.run / "base-hf", demo.run / "dense", "--dense", made_from=["export-base"])
    train(demo, "full-finetune", "dense", "convert-dense", {"expanded": 1}, demo.run / "dense")


def two_stages(demo: Steps, seed: int) -> None:
    """Upcycle, post-pretrain and review; export each stage as a stock Hugging Face model; verify three conversions."""
    run = demo.run
    base = run / "base-hf"
    held_out = steps.held_out_files(run).values()
    experts = ("--num-new-experts", str(NUM_NEW_EXPERTS), "--topk", str(TOPK), "--original-copies", str(COPIES))
    demo.step(
        "plan",
        *("-m", "moelpr.plan", "--hf-path", base, *experts, "--gpus", "2", "--gpu-memory-gib", "8"),
        *("--seq-length", "128", "--dtype", "fp32"),
        made_from=["export-base"],
    )
    seeded = ("--seed", str(seed))
    convert(demo, "upcycle", base, run / "upcycled", *experts, *seeded, made_from=["export-base"])
    verify = ("checkpoint_convert/verify.py", "--json")
    checked = ("--frozen", base, run / "upcycled", "--text", *held_out)
    demo.step("check-upcycled", *verify, *checked, made_from=["export-base", "upcycle", "corpus"])
    train(demo, "stage1", "stage1", "upcycle", {"expanded": 1}, run / "upcycled", *seeded)
    train(demo, "stage2", "stage2", "stage1", REVIEW_BLEND, run / "stage1", *seeded)
    checked = ("--frozen", base, run / "stage2-hf")
    demo.step("check-frozen", *verify, *checked, made_from=["export-base", "export-stage2"])
    checked = (run / "stage2", run / "stage2-hf", "--text", *held_out)
    demo.step("check-export", *verify, *checked, made_from=["stage2", "export-stage2", "corpus"])


def train(
    demo: Steps, name: str, stage: str, started_from: str, blend: dict[str, float], start: Path, *options: str
) -> None:
    """Train a stage from the folder `start`, which the step `started_from` wrote."""
    made_from = [started_from, *(f"preprocess-{group}" for group in blend)]
    steps.train(demo, name, stage, start, demo.run / "data", blend, *options, made_from=made_from)


def evaluate(demo: Steps) -> None:
    """Bits per byte, routing and continuations of the four models on held-out text."""
    for command, models, options in (
        ("text", MODELS, ["--continuations", "40"]),
        ("routing", ("stage1", "stage2"), []),
    ):
        directories = {model: demo.run / f"{MODELS[model]}-hf" for model in models}
        name = "evaluate" if command == "text" else f"evaluate-{command}"
        made_from = ["corpus", *(f"export-{MODELS[model]}" for model in models)]
        steps.evaluate(demo, name, command, directories, demo.run, options, made_from=made_from)


def report(demo: Steps) -> None:
    run = demo.run
    facts = {
        "Demo": {
            "base model": f"Qwen2 {BASE_SHAPE}",
            "vocabulary": VOCABULARY,
            "data of the base": _blend(BASE_BLEND),
            "data of stage 2": _blend(REVIEW_BLEND),
            "experts": f"{NUM_NEW_EXPERTS} new and {COPIES} copies of the original, top-{TOPK}",
            "evaluation": "windows of 128 tokens, 32 of them context, all held-out documents",
        },
        # The report must not depend on itself.
        "Wall time in seconds": {name: wall_s for name, wall_s in demo.wall_times_s().items() if name != "report"},
    }
    measured = json.loads(Path("docs", FILE_NAME).read_text(encoding="utf-8"))
    facts |= {
        f"Stage 2 against base over seeds {', '.join(map(str, measured['seeds']))}": {
            language_name(language): value_range(changes)
            for language, changes in measured["settings"][SETTING]["change"].items()
        }
    }
    write_text(run / "facts.yaml", dump(facts))
    claims = Path("examples/demo-claims.yaml")
    checks = [f"check-{name}" for name in ("upcycled", "frozen", "export")]
    demo.step(
        "report",
        *("-m", "moelpr.report", *(run / folder for folder in MODELS.values())),
        *("--evaluation", run / "evaluation" / "results.json"),
        *("--verification", *(demo.logs / f"{check}.log" for check in checks)),
        *("--claims", claims, "--facts", run / "facts.yaml", "--output", run),
        made_from=[*MODELS.values(), "evaluate", "evaluate-routing", *checks],
        files=[claims, run / "facts.yaml"],
    )
    numbers = json.loads((run / "report.json").read_text(encoding="utf-8"))
    rows = [
        [language, *(f"{numbers['bits_per_byte'][model][language]['value']:.3f}" for model in MODELS)]
        for language in numbers["languages"]
    ]
    print(f"\n{terminal_table(Table(['bits per byte (lower is better)', *MODELS], rows))}\n\n{numbers['title']}")
    for claim in numbers["claims"]:
        if not claim["ok"]:
            print(f"  not shown: {claim['language'] or claim['name']}: {claim['found']}; claim: {claim['claim']}")
    print(f"\nreport: {run / 'report.html'}")


def _blend(blend: dict[str, float]) -> str:
    return ", ".join(f"{weight} parts {group}" for group, weight in blend.items())


if __name__ == "__main__":
    run_command(main)
