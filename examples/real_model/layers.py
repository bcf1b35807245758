"""Which layers need experts, tried: stage 1 with experts in layers that are measured, evenly spaced, random, and all.

    python -m examples.real_model.layers --real-model runs/real-model --run runs/real-model-layers

A third and a half of the layers of the real model, which as a Qwen2 may keep dense layers. All settings have the same
text, number of tokens and seed. Writes `<run>/layers.json` and `layers.md`, which ends with the verdict by the rule of
docs/design/planner.md. Every step is a command; finished steps are skipped and interrupted trainings continue.
"""

import json
import os
import random
import shutil
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from statistics import fmean
from typing import Any

from examples import steps
from examples.real_model.settings import (
    BATCH,
    BETA2,
    EXPANDED,
    GROUPS,
    LANGUAGES,
    MICRO_BATCH,
    NUM_NEW_EXPERTS,
    ORIGINAL,
    SEQUENCE_LENGTH,
    STAGE1_RATE,
    STEP_TOKENS,
    TOPK,
    minimum_rate,
)
from examples.real_model.tasks import held_out_files
from examples.steps import ROOT, Steps
from moelpr.errors import CommandParser, UserError, run_command
from moelpr.evaluate.layers import LayerSimilarity, least_similar
from moelpr.families.families import read_base
from moelpr.files import write_text
from moelpr.languages import language_name
from moelpr.report.page import Table, terminal_table
from moelpr.report.plots import percent

SHARES = {"third": 1 / 3, "half": 1 / 2}
NUM_RANDOM = 2
# The rule: by how much the measured layers must beat evenly spaced ones, as a fraction of the base's bits per byte.
MARGIN = 0.005
EXPERTS = ("--num-new-experts", str(NUM_NEW_EXPERTS), "--topk", str(TOPK))
TRAINING = (
    "--seq-length", str(SEQUENCE_LENGTH), "--global-batch-size", str(BATCH), "--micro-batch-size", str(MICRO_BATCH),
    "--bf16", "--lr", f"{STAGE1_RATE:g}", "--min-lr", f"{minimum_rate(STAGE1_RATE):g}", "--lr-decay-style", "cosine",
    "--weight-decay", "0", "--adam-beta2", str(BETA2),
    "--log-interval", "5", "--save-interval", "20", "--save-retain-interval", "20000",
)  # fmt: skip


@dataclass(frozen=True)
class Setting:
    """A choice of the layers that have experts, from 0."""

    name: str
    label: str
    layers: list[int]


def main() -> None:
    parser = CommandParser(description=__doc__.splitlines()[0])
    parser.add_argument("--real-model", type=Path, default=Path("runs/real-model"), metavar="DIR",
        help="folder with base-hf and corpus of examples.real_model (default: %(default)s)")  # fmt: skip
    parser.add_argument("--run", type=Path, default=Path("runs/real-model-layers"), metavar="DIR",
        help="output folder (default: %(default)s)")  # fmt: skip
    parser.add_argument("--tokens", type=int, default=40 * STEP_TOKENS, metavar="N",
        help=f"tokens of stage 1 per setting, in steps of {STEP_TOKENS:,} (default: %(default)s)")  # fmt: skip
    parser.add_argument("--documents", type=int, default=6, metavar="N",
        help="held-out documents per language and kind of text (default: %(default)s)")  # fmt: skip
    parser.add_argument("--seed", type=int, default=1, metavar="N",
        help="seed of routers and of the order of the text (default: %(default)s)")  # fmt: skip
    args = parser.parse_args()
    os.chdir(ROOT)
    corpus = args.real_model / "corpus"
    for path in (args.real_model / "base-hf" / "config.json", corpus / "facts.json"):
        if not path.is_file():
            raise UserError(f"{path} is missing; make base and text of the real model first, or pass --real-model")
    run = Steps(args.run)
    check_same_arguments(args.run, f"--tokens {args.tokens} --documents {args.documents} --seed {args.seed}")
    base = prepare(run, args.real_model)
    settings = choose_settings(run, corpus, base)
    for setting in settings:
        try_setting(run, corpus, base, setting, args.tokens, args.documents, args.seed)
    trained_kinds = json.loads((corpus / "facts.json").read_text(encoding="utf-8"))["trained"]
    write_results(run, settings, trained_kinds, args.tokens)


def check_same_arguments(run: Path, arguments: str) -> None:
    """Checkpoints of finished settings are deleted, so other arguments need another folder."""
    record = run / "arguments.txt"
    before = record.read_text(encoding="utf-8").strip() if record.exists() else arguments
    if before != arguments:
        raise UserError(f"--run {run} was started with {before}, not {arguments}; pass another --run")
    write_text(record, arguments + "\n")


def prepare(run: Steps, real_model: Path) -> Path:
    """The base as a class that may keep dense layers; also makes the corpus of the expanded languages."""
    base = real_model / "base-hf"
    if not read_base(base)[0].moe_class.may_mix_layers:
        dense = run.run / "base-hf"
        run.step("as-qwen2", "-m", "examples.real_model.as_qwen2", "--hf-path", base, "--save", dense, "--overwrite")
        base = dense
    run.step(
        "preprocess",
        *("data_tools/preprocess_data.py", "--input", *(train_file(real_model / "corpus", x) for x in EXPANDED)),
        *("--output-prefix", run.run / "data" / "expanded", "--tokenizer-type", "HuggingFaceTokenizer"),
        *("--tokenizer-model", base, "--append-eod", "--language", "expanded", "--overwrite"),
    )
    return base


def choose_settings(run: Steps, corpus: Path, base: Path) -> list[Setting]:
    """All layers, then per share the measured, the evenly spaced and the random layers."""
    texts = [f"{language}={train_file(corpus, language)}" for language in LANGUAGES]
    options = ("--original-languages", ",".join(ORIGINAL), "--json")
    run.step("measure", "-m", "moelpr.plan", "layers", "--hf-path", base, "--data", *texts, *options)
    measured = json.loads((run.logs / "measure.log").read_text(encoding="utf-8"))["layers"]
    similarities = [LayerSimilarity(layer["expanded"], layer["original"]) for layer in measured]
    total = len(similarities)
    settings = [Setting("all", f"all {total} layers", list(range(total)))]
    for name, share in SHARES.items():
        chosen = least_similar(similarities, share)
        number = len(chosen)
        settings.append(Setting(f"{name}-measured", f"{number} measured", chosen))
        settings.append(Setting(f"{name}-even", f"{number} evenly spaced", evenly_spaced(total, number)))
        for draw in range(1, NUM_RANDOM + 1):
            layers = sorted(random.Random(1000 * number + draw).sample(range(total), number))
            settings.append(Setting(f"{name}-random-{draw}", f"{number} random, draw {draw}", layers))
    return settings


def evenly_spaced(total: int, number: int) -> list[int]:
    """The last layer of each of `number` parts: layers k, 2k, 3k, …, counted from 1, if `number` divides `total`."""
    return [(part + 1) * total // number - 1 for part in range(number)]


def try_setting(run: Steps, corpus: Path, base: Path, setting: Setting, tokens: int, documents: int, seed: int) -> None:
    """Upcycling, stage 1 and evaluation; its checkpoints take gigabytes and are deleted."""
    start, trained = run.run / f"upcycled-{setting.name}", run.run / setting.name
    seeded = ("--seed", str(seed))
    steps.convert(run, start.name, base, start, *EXPERTS, "--moe-layers", ",".join(map(str, setting.layers)), *seeded)
    num_steps = max(2, tokens // STEP_TOKENS)
    run.step(
        setting.name,
        *("launch/stage1.sh", "--pretrained-checkpoint", start, "--save", trained, *TRAINING, *seeded),
        *("--data-path", run.run / "data" / "expanded_text_document", "--train-iters", str(num_steps)),
        *("--lr-warmup-iters", str(max(1, num_steps // 16))),
        NPROC_PER_NODE="1",
    )
    data = [word for name, path in held_out_files(corpus).items() for word in ("--data", f"{name}={path}")]
    run.step(
        f"evaluate-{setting.name}",
        *("-m", "moelpr.evaluate", "--model", f"base={base}", "--model", f"{setting.name}={trained}", *data),
        *("--max-documents", str(documents), "--sequence-length", str(SEQUENCE_LENGTH), "--dtype", "bfloat16"),
        *("--output", run.run / "evaluation", "--json"),
    )
    for folder in (start, trained):
        shutil.rmtree(folder, ignore_errors=True)


def train_file(corpus: Path, language: str) -> Path:
    return corpus / f"train.{language}.jsonl"


def write_results(run: Steps, settings: Sequence[Setting], trained_kinds: Sequence[str], tokens: int) -> None:
    """Write layers.json and layers.md."""
    changes = {}
    for setting in settings:
        output = (run.logs / f"evaluate-{setting.name}.log").read_text(encoding="utf-8").splitlines()[-1]
        models = json.loads(output)["models"]
        bits, base = (
            {text: score["bits_per_byte"]["value"] for text, score in models[name]["languages"].items()}
            for name in (setting.name, "base")
        )
        changes[setting.name] = {text: bits[text] / base[text] - 1 for text in bits}
    minutes = {setting.name: run.wall_times_s()[setting.name] / 60 for setting in settings}
    results = {
        "tokens": tokens,
        "trained_kinds": trained_kinds,
        "settings": [asdict(setting) | {"minutes": minutes[setting.name]} for setting in settings],
        "change": changes,
    }
    write_text(run.run / "layers.json", json.dumps(results, indent=1) + "\n")
    write_text(run.run / "layers.md", results_text(results) + "\n")
    print(results_text(results))


def results_text(results: Mapping[str, Any]) -> str:
    """Markdown: mean changes of bits per byte against base, those of each language, the layers, and the verdict."""
    means, languages = [], []
    for setting in results["settings"]:
        name, label = setting["name"], setting["label"]
        values = (mean(results, name, group, is_trained) for group in GROUPS.values() for is_trained in (True, False))
        means.append([label, *map(percent, values), f"{setting['minutes']:.0f}"])
        each = ([percent(mean(results, name, [x], is_trained)) for is_trained in (True, False)] for x in LANGUAGES)
        languages.append([label, *(" / ".join(pair) for pair in each)])
    head = [f"{group}, {kinds}" for group in GROUPS for kinds in ("trained kinds", "other kinds")]
    tables = [
        terminal_table(Table(["experts in", *head, "minutes"], means)),
        terminal_table(Table(["trained / other kinds", *map(language_name, LANGUAGES)], languages)),
    ]
    layers = [f"- {setting['label']}: {', '.join(map(str, setting['layers']))}" for setting in results["settings"]]
    return "\n\n".join([*tables, "\n".join(layers), verdict(results)])


def mean(results: Mapping[str, Any], setting: str, languages: Sequence[str], is_trained: bool) -> float:
    """Mean change of a setting over languages and over the kinds of text that were trained on, or the others."""

    def values() -> Iterator[float]:
        for text, change in results["change"][setting].items():
            language, _, kind = text.partition(".")
            if language in languages and (kind in results["trained_kinds"]) == is_trained:
                yield change

    return fmean(values())


def verdict(results: Mapping[str, Any]) -> str:
    """Whether the measured layers beat evenly spaced ones by MARGIN, at every share, without more forgetting."""

    def change(setting: str, languages: Sequence[str]) -> float:
        return fmean(mean(results, setting, languages, is_trained) for is_trained in (True, False))

    findings, wins = [], []
    for share in SHARES:
        learning = change(f"{share}-even", EXPANDED) - change(f"{share}-measured", EXPANDED)
        forgetting = change(f"{share}-measured", ORIGINAL) - change(f"{share}-even", ORIGINAL)
        wins.append(learning >= MARGIN and forgetting <= MARGIN)
        findings.append(f"with a {share} they learn {points(learning)} more and forget {points(forgetting)} more")
    answer = "The measured layers beat evenly spaced ones" if all(wins) else "The measured layers do not beat even ones"
    return f"{answer}: {'; '.join(findings)}."


def points(fraction: float) -> str:
    """Percentage points, with a sign."""
    return f"{percent(fraction, digits=2).removesuffix('%')} points"


if __name__ == "__main__":
    run_command(main)
