"""The whole job on real text: corpus -> dense base -> upcycle -> stage 1 -> stage 2 -> Hugging Face -> report.

    make demo            (python examples/demo.py --run runs/demo)

Every step is a command a user would give; it is printed before it runs, and its full output is kept in
`<run>/logs/`. A step that has finished is not done again, so an interrupted demo goes on where it stopped.
"""

import argparse
import json
import os
import shutil
import subprocess
import sys
import time
from dataclasses import dataclass, field
from pathlib import Path

from moelpr.errors import UserError, run_command

ROOT = Path(__file__).resolve().parent.parent
RECIPES = Path("launch/recipes")
ORIGINAL, EXPANDED = ("en", "es", "zh"), ("el", "hu", "tr")
VOCABULARY = 4096
BASE_SHAPE = {
    "hidden-size": 256,
    "num-layers": 6,
    "ffn-hidden-size": 768,
    "num-attention-heads": 4,
    "num-query-groups": 2,
}
NUM_NEW_EXPERTS, TOPK = 4, 2
# What the base saw of the expanded languages: a little, as real bases have.
BASE_BLEND = {"original": 10, "expanded": 1}
REVIEW_BLEND = {"original": 2, "expanded": 5}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--run", type=Path, default=Path("runs/demo"), help="folder of the run (default: %(default)s)")
    parser.add_argument("--cache", type=Path, help="where the downloaded corpus is kept (default: ~/.cache/moelpr)")
    parser.add_argument("--overwrite", action="store_true", help="start afresh where a run exists")
    parser.add_argument("--debug", action="store_true", help="show tracebacks")
    args = parser.parse_args()
    os.chdir(ROOT)
    if args.overwrite:
        shutil.rmtree(args.run, ignore_errors=True)
    demo = Demo(args.run)
    prepare_data(demo, args.cache)
    train_base(demo)
    full_finetune(demo)
    two_stages(demo)
    write_report(demo)


@dataclass
class Demo:
    """The run's folder, and the steps done in it."""

    run: Path
    started: float = field(default_factory=time.monotonic)

    def __post_init__(self) -> None:
        (self.run / "logs").mkdir(parents=True, exist_ok=True)

    def step(self, name: str, *command: str | Path, **variables: str) -> None:
        """Run one command unless its done-mark is there; stop the demo with its last words where it fails."""
        mark, log = self.run / "logs" / f"{name}.json", self.run / "logs" / f"{name}.log"
        if mark.exists():
            print(f"[{self._clock()}] {name}: done before")
            return
        words = [str(word) for word in command]
        shown = [word.removeprefix(f"{ROOT}/") for word in words]
        print(f"[{self._clock()}] {name}\n    {' '.join(shown)}", flush=True)
        start = time.monotonic()
        quiet = {"PYTHONWARNINGS": "ignore", "OMP_WAIT_POLICY": "passive"}  # ranks that wait must not take a core
        with open(log, "w") as file:
            code = subprocess.run(words, stdout=file, env={**os.environ, **quiet, **variables}).returncode
        if code != 0:
            tail = log.read_text().splitlines()[-5:]
            raise UserError(
                f"step {name} ended with code {code}; its output is in {log}"
                + "".join(f"\n    {line}" for line in tail)
            )
        mark.write_text(json.dumps({"command": shown, "wall_s": round(time.monotonic() - start, 1)}) + "\n")

    def output_of(self, name: str) -> str:
        return (self.run / "logs" / f"{name}.log").read_text()

    def wall_times_s(self) -> dict[str, float]:
        marks = sorted((self.run / "logs").glob("*.json"), key=lambda path: path.stat().st_mtime)
        return {path.stem: json.loads(path.read_text())["wall_s"] for path in marks}

    def _clock(self) -> str:
        minutes, seconds = divmod(int(time.monotonic() - self.started), 60)
        return f"{minutes:2d}:{seconds:02d}"


def python(*words: str | Path) -> list[str | Path]:
    return [sys.executable, *words]


def prepare_data(demo: Demo, cache: Path | None) -> None:
    """Six languages of real text, a tokenizer of all six, one tagged corpus per language group."""
    run = demo.run
    where = ["--cache", cache] if cache else []
    demo.step("corpus", *python("data_tools/demo_corpus.py", "--output", run / "corpus", *where))
    train_files = [run / "corpus" / f"train.{language}.jsonl" for language in (*ORIGINAL, *EXPANDED)]
    demo.step(
        "tokenizer",
        *python("data_tools/demo_tokenizer.py", "--input", *train_files, "--output", run / "tokenizer"),
        *("--vocab-size", str(VOCABULARY), "--overwrite"),
    )
    for group, languages in (("original", ORIGINAL), ("expanded", EXPANDED)):
        demo.step(
            f"preprocess-{group}",
            *python("data_tools/preprocess_data.py", "--input"),
            *(run / "corpus" / f"train.{language}.jsonl" for language in languages),
            *("--output-prefix", run / "data" / group, "--tokenizer-type", "HuggingFaceTokenizer"),
            *("--tokenizer-model", run / "tokenizer", "--append-eod", "--language", group),
            *("--workers", "2", "--overwrite"),
        )


def train_base(demo: Demo) -> None:
    """A dense Qwen2 from scratch with this same trainer. From its export on, it might as well have been downloaded."""
    run = demo.run
    shape = [word for name, value in BASE_SHAPE.items() for word in (f"--{name}", str(value))]
    demo.step(
        "untrained",
        *python("examples/untrained_qwen2.py", "--tokenizer", run / "tokenizer", "--save", run / "untrained-hf"),
        *(*shape, "--overwrite"),
    )
    convert(demo, "convert-untrained", run / "untrained-hf", run / "untrained", "--dense")
    train(demo, "base", "dense", run / "untrained", BASE_BLEND)
    export(demo, "base")


def full_finetune(demo: Demo) -> None:
    """What a user would do instead: all parameters of the base on the text of stage 1, for as many tokens."""
    convert(demo, "convert-dense", demo.run / "base-hf", demo.run / "dense", "--dense")
    train(demo, "full-finetune", "dense", demo.run / "dense", {"expanded": 1})
    export(demo, "full-finetune")


def two_stages(demo: Demo) -> None:
    """Upcycle, post-pretrain, review, each exported as a stock Hugging Face model; then the three checks."""
    run = demo.run
    base = run / "base-hf"
    experts = ("--num-new-experts", str(NUM_NEW_EXPERTS), "--topk", str(TOPK))
    convert(demo, "upcycle", base, run / "upcycled", *experts)
    verify(demo, "check-upcycled", "--frozen", base, run / "upcycled", "--text", *held_out_files(run))
    train(demo, "stage1", "stage1", run / "upcycled", {"expanded": 1})
    export(demo, "stage1")
    train(demo, "stage2", "stage2", run / "stage1", REVIEW_BLEND)
    export(demo, "stage2")
    verify(demo, "check-frozen", "--frozen", base, run / "stage2-hf")
    verify(demo, "check-export", run / "stage2", run / "stage2-hf", "--text", *held_out_files(run))


def convert(demo: Demo, name: str, hf_path: Path, save: Path, *options: str) -> None:
    demo.step(
        name,
        *python("checkpoint_convert/hf_to_mcore.py", "--hf-path", hf_path, "--save", save, *options, "--overwrite"),
    )


def train(demo: Demo, name: str, stage: str, start: Path, blend: dict[str, float]) -> None:
    data = [
        word for group, weight in blend.items() for word in (str(weight), demo.run / "data" / f"{group}_text_document")
    ]
    demo.step(
        name,
        *(f"launch/{stage}.sh", "--recipe", RECIPES / f"demo-{name}.yaml", "--pretrained-checkpoint", start),
        *("--data-path", *data, "--save", demo.run / name),
        NPROC_PER_NODE=str(_num_ranks()),
    )


def _num_ranks() -> int:
    """Two ranks: on two GPUs if there are as many, on one GPU or two CPU cores otherwise as many as there are."""
    import torch

    return min(torch.cuda.device_count(), 2) or 2


def export(demo: Demo, name: str) -> None:
    save = demo.run / f"{name}-hf"
    demo.step(
        f"export-{name}",
        *python("checkpoint_convert/mcore_to_hf.py", "--load", demo.run / name, "--save", save, "--overwrite"),
    )


def verify(demo: Demo, name: str, *words: str | Path) -> None:
    demo.step(name, *python("checkpoint_convert/verify.py", *words, "--json"))


def held_out_files(run: Path) -> list[Path]:
    return [run / "corpus" / f"validation.{language}.jsonl" for language in (*ORIGINAL, *EXPANDED)]


def write_report(demo: Demo) -> None:
    """Bits per byte, routing and continuations of the four models on held-out text; report.json, report.html."""
    from moelpr.documents import read_documents
    from moelpr.evaluate.compare import compare_models
    from moelpr.evaluate.generate import choose_prompt
    from moelpr.evaluate.perplexity import Settings
    from moelpr.report.demo import Continuation, Report, write_report
    from moelpr.report.demo_pictures import headline_picture
    from moelpr.versions import installed_versions

    run = demo.run
    start = time.monotonic()
    print(f"[{demo._clock()}] evaluate: four models on held-out text of six languages", flush=True)
    languages = dict.fromkeys(ORIGINAL, "original") | dict.fromkeys(EXPANDED, "expanded")
    documents = {language: read_documents(run / "corpus" / f"validation.{language}.jsonl") for language in languages}
    prompts = {language: choose_prompt(texts) for language, texts in documents.items()}
    folders = {"base": "base", "full_finetune": "full-finetune", "stage1": "stage1", "stage2": "stage2"}
    results = compare_models(
        {model: run / f"{folder}-hf" for model, folder in folders.items()},
        documents,
        Settings(sequence_length=128, context=32),
        prompts={language: prompt.text for language, prompt in prompts.items()},
        device="cpu",
    )
    report = Report(
        languages=languages,
        bits_per_byte={model: result.bits_per_byte for model, result in results.items()},
        original_expert_share={
            stage: share for stage in ("stage1", "stage2") if (share := results[stage].original_expert_share)
        },
        checks={
            "upcycle_max_abs_logit_diff": _last_json(demo, "check-upcycled")["max_abs_logit_diff"],
            "frozen_max_abs_diff": _last_json(demo, "check-frozen")["max_abs_diff"],
            "export_max_abs_logit_diff": _last_json(demo, "check-export")["max_abs_logit_diff"],
        },
        token_counts={model: _trained_tokens(run / folder) for model, folder in folders.items()},
        wall_times_s=demo.wall_times_s() | {"evaluate": round(time.monotonic() - start, 1)},
        versions=installed_versions(),
        settings={
            "base": f"Qwen2, {BASE_SHAPE}, vocabulary {VOCABULARY}, data {BASE_BLEND}",
            "experts": f"{NUM_NEW_EXPERTS} new + the original, top-{TOPK}",
            "stage 2 data": str(REVIEW_BLEND),
            "recipes": ", ".join(sorted(str(path) for path in RECIPES.glob("demo-*.yaml"))),
            "evaluation": "windows of 128 tokens, 32 of them context, all held-out documents",
        },
        continuations={
            language: Continuation(
                prompt.text,
                prompt.reference,
                {model: result.continuations[language] for model, result in results.items()},
            )
            for language, prompt in prompts.items()
        },
        metrics={model: f"{folder}/metrics.jsonl" for model, folder in folders.items()},
    )
    page = write_report(run, report)
    (run / "headline.svg").write_text(headline_picture(report), encoding="utf-8")
    _print_summary(report)
    print(f"[{demo._clock()}] report: {page}")


def _last_json(demo: Demo, step: str) -> dict[str, float]:
    return json.loads(demo.output_of(step).strip().splitlines()[-1])


def _trained_tokens(run: Path) -> int:
    from moelpr.run_metrics import read_metrics

    return int(read_metrics(run / "metrics.jsonl")[-1]["consumed_tokens"])


def _print_summary(report) -> None:  # noqa: ANN001
    from moelpr.evaluate.compare import markdown_table
    from moelpr.report.demo import failures

    print("\nBits per byte on held-out text (fewer is better)\n")
    print(markdown_table(report.bits_per_byte))
    for sentence in failures(report) or ["everything promised is shown"]:
        print(f"  {sentence}")
    print()


if __name__ == "__main__":
    run_command(main)
