"""The whole job on real text: corpus -> dense base -> upcycle -> stage 1 -> stage 2 -> Hugging Face -> report.

    make demo            (python examples/demo.py --run runs/demo)

Every step is a command that you could paste into a shell; it is printed before it runs. What it prints is kept in
`<run>/logs/`. Finished steps are skipped, so rerun the demo to resume it.
"""

import json
import os
import shlex
import shutil
import subprocess
import sys
import time
from pathlib import Path

from moelpr.errors import CommandParser, UserError, run_command
from moelpr.files import atomic_file
from moelpr.report.page import Table, terminal_table
from moelpr.yaml_files import dump

ROOT = Path(__file__).resolve().parent.parent
RECIPES = Path("launch/recipes")
ORIGINAL, EXPANDED = ("en", "es", "zh"), ("el", "hu", "tr")
# Model in the evaluation -> run folder.
MODELS = {"base": "base", "full_finetune": "full-finetune", "stage1": "stage1", "stage2": "stage2"}
VOCABULARY = 4096
BASE_SHAPE = "--hidden-size 256 --num-layers 6 --ffn-hidden-size 768 --num-attention-heads 4 --num-query-groups 2"
NUM_NEW_EXPERTS, TOPK = 4, 2
# The base saw a little text of the expanded languages, as real bases have.
BASE_BLEND = {"original": 10, "expanded": 1}
REVIEW_BLEND = {"original": 2, "expanded": 5}


def main() -> None:
    parser = CommandParser(description=__doc__.splitlines()[0])
    parser.add_argument("--run", type=Path, default=Path("runs/demo"), help="output folder (default: %(default)s)")
    parser.add_argument("--cache", type=Path, help="folder for the downloaded corpus (default: ~/.cache/moelpr)")
    parser.add_argument("--overwrite", action="store_true", help="delete an existing run and start from scratch")
    args = parser.parse_args()
    os.chdir(ROOT)
    if args.overwrite:
        shutil.rmtree(args.run, ignore_errors=True)
    demo = Demo(args.run)
    prepare_data(demo, args.cache)
    train_base(demo)
    full_finetune(demo)
    two_stages(demo)
    evaluate(demo)
    report(demo)


class Demo:
    """The run folder and the steps that are done in it."""

    def __init__(self, run: Path) -> None:
        self.run, self.logs = run, run / "logs"
        self._started = time.monotonic()
        self.logs.mkdir(parents=True, exist_ok=True)

    def step(self, name: str, *command: str | Path, **variables: str) -> None:
        """Run a launcher, or Python with these arguments, unless it is done; a failure stops the demo."""
        mark, log = self.logs / f"{name}.json", self.logs / f"{name}.log"
        if mark.exists():
            print(f"[{self._clock()}] {name}: already done")
            return
        words = [str(word) for word in command]
        words = words if words[0].endswith(".sh") else [sys.executable, *words]
        settings = " ".join(f"{key}={value} " for key, value in variables.items())
        shown = settings + shlex.join(word.removeprefix(f"{ROOT}/") for word in words) + f" >{log}"
        print(f"[{self._clock()}] {name}\n    {shown}", flush=True)
        start = time.monotonic()
        quiet = {"PYTHONWARNINGS": "ignore", "OMP_WAIT_POLICY": "passive"}  # waiting ranks must not occupy a core
        with open(log, "w") as file:
            code = subprocess.run(words, stdout=file, env={**os.environ, **quiet, **variables}).returncode
        if code != 0:
            tail = "".join(f"\n    {line}" for line in log.read_text().splitlines()[-5:])
            raise UserError(f"step {name} exited with code {code}; its output is in {log}{tail}")
        mark.write_text(json.dumps({"command": shown, "wall_s": round(time.monotonic() - start, 1)}) + "\n")

    def wall_times_s(self) -> dict[str, float]:
        marks = sorted(self.logs.glob("*.json"), key=lambda path: path.stat().st_mtime)
        return {path.stem: json.loads(path.read_text())["wall_s"] for path in marks}

    def _clock(self) -> str:
        minutes, seconds = divmod(int(time.monotonic() - self._started), 60)
        return f"{minutes:2d}:{seconds:02d}"


def prepare_data(demo: Demo, cache: Path | None) -> None:
    """Real text in six languages, a tokenizer for all six, one tagged corpus per language group."""
    run = demo.run
    where = ["--cache", cache] if cache else []
    demo.step("corpus", "data_tools/demo_corpus.py", "--output", run / "corpus", *where)
    train_files = {name: run / "corpus" / f"train.{name}.jsonl" for name in (*ORIGINAL, *EXPANDED)}
    demo.step(
        "tokenizer",
        *("data_tools/demo_tokenizer.py", "--input", *train_files.values(), "--output", run / "tokenizer"),
        *("--vocab-size", str(VOCABULARY), "--overwrite"),
    )
    for group, languages in (("original", ORIGINAL), ("expanded", EXPANDED)):
        demo.step(
            f"preprocess-{group}",
            *("data_tools/preprocess_data.py", "--input", *(train_files[name] for name in languages)),
            *("--output-prefix", run / "data" / group, "--tokenizer-type", "HuggingFaceTokenizer"),
            *("--tokenizer-model", run / "tokenizer", "--append-eod", "--language", group),
            *("--workers", "2", "--overwrite"),
        )


def train_base(demo: Demo) -> None:
    """Train a dense Qwen2 from scratch with the same trainer; its export is used as if it had been downloaded."""
    save = demo.run / "untrained-hf"
    words = ["--tokenizer", demo.run / "tokenizer", "--save", save, *BASE_SHAPE.split(), "--overwrite"]
    demo.step("untrained", "examples/untrained_qwen2.py", *words)
    convert(demo, "convert-untrained", save, demo.run / "untrained", "--dense")
    train(demo, "base", "dense", demo.run / "untrained", BASE_BLEND)


def full_finetune(demo: Demo) -> None:
    """The usual alternative: train all parameters of the base on the text of stage 1, for as many tokens."""
    convert(demo, "convert-dense", demo.run / "base-hf", demo.run / "dense", "--dense")
    train(demo, "full-finetune", "dense", demo.run / "dense", {"expanded": 1})


def two_stages(demo: Demo) -> None:
    """Upcycle, post-pretrain and review; export each stage as a stock Hugging Face model; verify three conversions."""
    run = demo.run
    base = run / "base-hf"
    held_out = held_out_files(run).values()
    experts = ("--num-new-experts", str(NUM_NEW_EXPERTS), "--topk", str(TOPK))
    demo.step(
        "plan",
        *("-m", "moelpr.plan", "--hf-path", base, *experts, "--gpus", "2", "--gpu-memory-gib", "8"),
        *("--seq-length", "128", "--dtype", "fp32"),
    )
    convert(demo, "upcycle", base, run / "upcycled", *experts)
    verify = ("checkpoint_convert/verify.py", "--json")
    demo.step("check-upcycled", *verify, "--frozen", base, run / "upcycled", "--text", *held_out)
    train(demo, "stage1", "stage1", run / "upcycled", {"expanded": 1})
    train(demo, "stage2", "stage2", run / "stage1", REVIEW_BLEND)
    demo.step("check-frozen", *verify, "--frozen", base, run / "stage2-hf")
    demo.step("check-export", *verify, run / "stage2", run / "stage2-hf", "--text", *held_out)


def convert(demo: Demo, name: str, hf_path: Path, save: Path, *options: str) -> None:
    words = ("--hf-path", hf_path, "--save", save, *options, "--overwrite")
    demo.step(name, "checkpoint_convert/hf_to_mcore.py", *words)


def train(demo: Demo, name: str, stage: str, start: Path, blend: dict[str, float]) -> None:
    """Train on one rank if the machine has one GPU, otherwise on two: on two GPUs or two CPU cores. Then export."""
    import torch

    run, data = demo.run, demo.run / "data"
    demo.step(
        name,
        *(f"launch/{stage}.sh", "--recipe", RECIPES / f"demo-{name}.yaml", "--pretrained-checkpoint", start),
        *("--data-path", *(word for group in blend for word in (str(blend[group]), data / f"{group}_text_document"))),
        *("--save", run / name),
        NPROC_PER_NODE=str(min(torch.cuda.device_count(), 2) or 2),
    )
    words = ("--load", run / name, "--save", run / f"{name}-hf", "--overwrite")
    demo.step(f"export-{name}", "checkpoint_convert/mcore_to_hf.py", *words)


def held_out_files(run: Path) -> dict[str, Path]:
    return {name: run / "corpus" / f"validation.{name}.jsonl" for name in (*ORIGINAL, *EXPANDED)}


def evaluate(demo: Demo) -> None:
    """Bits per byte, routing and continuations of the four models on held-out text."""
    run = demo.run
    text = [word for name, path in held_out_files(run).items() for word in ("--data", f"{name}={path}")]
    text += ["--original-languages", ",".join(ORIGINAL), "--sequence-length", "128", "--context", "32"]
    text += ["--device", "cpu", "--output", str(run / "evaluation")]
    for command, models, options in (
        ("text", MODELS, ["--continuations", "40"]),
        ("routing", ("stage1", "stage2"), []),
    ):
        named = [word for model in models for word in ("--model", f"{model}={run / MODELS[model]}-hf")]
        name = "evaluate" if command == "text" else f"evaluate-{command}"
        demo.step(name, "-m", "moelpr.evaluate", command, *named, *text, *options)


def report(demo: Demo) -> None:
    run = demo.run
    facts = {
        "Demo": {
            "base model": f"Qwen2 {BASE_SHAPE}",
            "vocabulary": VOCABULARY,
            "data of the base": _blend(BASE_BLEND),
            "data of stage 2": _blend(REVIEW_BLEND),
            "experts": f"{NUM_NEW_EXPERTS} new and the original, top-{TOPK}",
            "evaluation": "windows of 128 tokens, 32 of them context, all held-out documents",
        },
        "Wall time in seconds": demo.wall_times_s(),
    }
    with atomic_file(run / "facts.yaml") as temporary:
        temporary.write_text(dump(facts), encoding="utf-8")
    demo.step(
        "report",
        *("-m", "moelpr.report", *(run / folder for folder in MODELS.values())),
        *("--evaluation", run / "evaluation" / "results.json"),
        *("--verification", *(demo.logs / f"check-{name}.log" for name in ("upcycled", "frozen", "export"))),
        *("--claims", "examples/demo-claims.yaml", "--facts", run / "facts.yaml", "--output", run),
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
