"""Learning against forgetting: both stages from the demo's base, for several settings and seeds.

    python -m examples.frontier --demo runs/demo --run runs/frontier

Writes `<run>/frontier.json`, `frontier.md` and `frontier.svg`. Every step is a command, as in the demo; finished steps
are skipped. Two settings are trained at a time, each on one rank.
"""

import json
import os
from collections.abc import Iterable, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from statistics import fmean
from typing import Any

from examples import steps
from examples.steps import EXPANDED, NUM_NEW_EXPERTS, ORIGINAL, REVIEW_BLEND, ROOT, TOPK, Steps
from moelpr.errors import CommandParser, UserError, run_command
from moelpr.files import write_text
from moelpr.languages import language_name
from moelpr.report.page import Table, terminal_table
from moelpr.report.plots import Series, percent, trade_off_chart


@dataclass(frozen=True)
class Setting:
    """One way to train. Settings with the same copies share stage 1 of a seed."""

    name: str
    copies: int  # C, --original-copies
    review: tuple[str, ...]  # flags of stage 2

    @property
    def label(self) -> str:
        return self.name.replace("-", " ")


SETTINGS = [
    Setting(
        f"{copies}-{'copies' if copies > 1 else 'copy'}-gamma-{gamma:g}", copies, ("--lpr-loss-coeff", f"{gamma:g}")
    )
    for copies in (1, TOPK)
    for gamma in (0.03, 0.1, 0.3)
]


def main() -> None:
    parser = CommandParser(description=__doc__.splitlines()[0])
    parser.add_argument("--demo", type=Path, default=Path("runs/demo"), metavar="DIR",
        help="folder of the demo, of which base and corpora are used (default: %(default)s)")  # fmt: skip
    parser.add_argument("--run", type=Path, default=Path("runs/frontier"), metavar="DIR",
        help="output folder (default: %(default)s)")  # fmt: skip
    parser.add_argument("--settings", nargs="+", choices=[setting.name for setting in SETTINGS], metavar="NAME",
        help=f"settings to train (default: all: {', '.join(setting.name for setting in SETTINGS)})")  # fmt: skip
    parser.add_argument("--seeds", type=int, nargs="+", default=[1, 2, 3], metavar="N",
        help="seeds of routers and of the order of the text (default: 1 2 3)")  # fmt: skip
    args = parser.parse_args()
    os.chdir(ROOT)
    if not (args.demo / "logs" / "export-base.json").is_file():
        raise UserError(f"--demo {args.demo} contains no finished base; run make demo first")
    settings = [setting for setting in SETTINGS if not args.settings or setting.name in args.settings]
    run = Steps(args.run)
    with ThreadPoolExecutor(max_workers=2) as pool:
        chains = [(copies, seed) for seed in args.seeds for copies in dict.fromkeys(s.copies for s in settings)]
        list(pool.map(lambda chain: train_chain(run, args.demo, settings, *chain), chains))
    models = {"base": args.demo / "base-hf"}
    models |= {name: args.run / f"{name}-hf" for name in model_names(settings, args.seeds)}
    steps.evaluate(run, "evaluate", "text", models, args.demo)
    steps.evaluate(
        run, "evaluate-routing", "routing", {m: path for m, path in models.items() if m != "base"}, args.demo
    )
    write_results(args.run, settings, args.seeds)


def train_chain(run: Steps, demo: Path, settings: Sequence[Setting], copies: int, seed: int) -> None:
    """Upcycling, stage 1, and every stage 2 that starts from it."""
    start, data = run.run / f"upcycled-{copies}-seed-{seed}", demo / "data"
    seeded = ("--seed", str(seed))
    experts = ("--num-new-experts", str(NUM_NEW_EXPERTS), "--topk", str(TOPK), "--original-copies", str(copies))
    steps.convert(run, start.name, demo / "base-hf", start, *experts, *seeded)
    name = stage1_name(copies, seed)
    steps.train(run, name, "stage1", start, data, {"expanded": 1}, *seeded, recipe="stage1", ranks=1)
    for setting in settings:
        if setting.copies == copies:
            options = (*seeded, *setting.review)
            name = stage2_name(setting, seed)
            steps.train(
                run, name, "stage2", run.run / stage1_name(copies, seed), data, REVIEW_BLEND, *options,
                recipe="stage2", ranks=1,
            )  # fmt: skip


def stage1_name(copies: int, seed: int) -> str:
    return f"stage1-{copies}-seed-{seed}"


def stage2_name(setting: Setting, seed: int) -> str:
    return f"{setting.name}-seed-{seed}"


def model_names(settings: Sequence[Setting], seeds: Iterable[int]) -> list[str]:
    """Names of the trained models, stage 1 before the stages 2 that started from it."""
    names = [name for seed in seeds for s in settings for name in (stage1_name(s.copies, seed), stage2_name(s, seed))]
    return list(dict.fromkeys(names))


# --- results


def write_results(run: Path, settings: Sequence[Setting], seeds: Sequence[int]) -> None:
    """Write frontier.json, frontier.md and frontier.svg."""
    text = json.loads((run / "evaluation" / "results.json").read_text(encoding="utf-8"))["models"]
    routing = json.loads((run / "evaluation" / "routing.json").read_text(encoding="utf-8"))["models"]
    results: dict[str, Any] = {"seeds": list(seeds), "settings": {}}
    for setting in settings:
        for stage, name_of in (("stage1", lambda s, seed: stage1_name(s.copies, seed)), ("stage2", stage2_name)):
            names = [name_of(setting, seed) for seed in seeds]
            key = setting.name if stage == "stage2" else f"stage1-{setting.copies}"
            results["settings"][key] = {
                "label": setting.label if stage == "stage2" else f"stage 1, {setting.label.split(' gamma')[0]}",
                "change": {
                    language: [relative_change(text, name, language) for name in names]
                    for language in (*ORIGINAL, *EXPANDED)
                },
                "all_original_share": {
                    language: [fmean(routing[name]["languages"][language]["all_original_share"]) for name in names]
                    for language in (*ORIGINAL, *EXPANDED)
                },
            }
    write_text(run / "frontier.json", json.dumps(results, indent=1) + "\n")
    write_text(run / "frontier.md", results_table(results) + "\n")
    write_text(run / "frontier.svg", frontier_chart(results) + "\n")
    print(results_table(results))


def relative_change(models: dict[str, Any], name: str, language: str) -> float:
    """Change of bits per byte against base."""
    value, base = (models[model]["languages"][language]["bits_per_byte"]["value"] for model in (name, "base"))
    return value / base - 1


def group_means(result: dict[str, Any], languages: Sequence[str]) -> list[float]:
    """The mean change of a group of languages, per seed."""
    return [fmean(changes) for changes in zip(*(result["change"][language] for language in languages), strict=True)]


def results_table(results: dict[str, Any]) -> str:
    """Markdown: mean over seeds and, below, the lowest and highest of them."""
    rows = []
    for result in results["settings"].values():
        columns = [result["change"][language] for language in (*ORIGINAL, *EXPANDED)]
        columns += [group_means(result, ORIGINAL), group_means(result, EXPANDED)]
        kept = fmean(fmean(result["all_original_share"][language]) for language in ORIGINAL)
        rows.append([result["label"], *(with_range(column) for column in columns), f"{kept:.0%}"])
    languages = [language_name(language) for language in (*ORIGINAL, *EXPANDED)]
    head = ["bits per byte against base", *languages, "mean original", "mean expanded", "all choices original"]
    return terminal_table(Table(head, rows))


def with_range(values: Sequence[float]) -> str:
    return f"{percent(fmean(values))} ({percent(min(values))} to {percent(max(values))})"


def frontier_chart(results: dict[str, Any]) -> str:
    """Forgetting over learning: one mark per seed, one line per number of copies through the means over seeds."""
    series: dict[str, dict[str, list[tuple[float, float]]]] = {}
    for key, result in results["settings"].items():
        if not key.startswith("stage1"):
            copies, gamma = result["label"].split(" gamma ")
            points = list(zip(group_means(result, EXPANDED), group_means(result, ORIGINAL), strict=True))
            series.setdefault(copies, {})[f"γ {gamma}"] = points
    return trade_off_chart(
        "Learning and forgetting after stage 2",
        [Series(name, groups) for name, groups in series.items()],
        x_axis="expanded languages: bits per byte against base",
        y_axis="original languages",
    )


if __name__ == "__main__":
    run_command(main)
