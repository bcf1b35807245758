"""Learning against forgetting: both stages from the demo's base, for several settings and seeds.

    python -m examples.frontier --demo runs/demo --run runs/frontier

Writes `<run>/frontier.json`, `frontier.md` and `frontier.svg`. Every step is a command, as in the demo; finished steps
are skipped. Two settings are trained at a time, each on one rank.
"""

import json
import os
from collections.abc import Iterable, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path

from examples import steps
from examples.frontier_results import FILE_NAME, frontier_chart, read_evaluation, results_tables
from examples.steps import NUM_NEW_EXPERTS, REVIEW_BLEND, ROOT, TOPK, Steps
from moelpr.process.command import CommandParser, run_command
from moelpr.process.errors import UserError
from moelpr.store.files import write_text


@dataclass(frozen=True)
class Setting:
    """One way to train. Settings with the same number of copies share stage 1 of a seed."""

    copies: int  # C, --original-copies
    gamma: float  # --lpr-loss-coeff

    @property
    def name(self) -> str:
        return f"{self.copies}-{'copy' if self.copies == 1 else 'copies'}-gamma-{self.gamma:g}"

    @property
    def label(self) -> str:
        return f"{copies_label(self.copies)}, \u03b3 {self.gamma:g}"


SETTINGS = [Setting(copies, gamma) for copies in (1, TOPK) for gamma in (0.03, 0.1, 0.3)]


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
    trained = {name: args.run / f"{name}-hf" for name in model_names(settings, args.seeds)}
    exports = [f"export-{name}" for name in trained]
    files = [models["base"]]
    steps.evaluate(run, "evaluate", "text", models | trained, args.demo, made_from=exports, files=files)
    steps.evaluate(run, "evaluate-routing", "routing", trained, args.demo, made_from=exports)
    write_results(args.run, settings, args.seeds)


def train_chain(run: Steps, demo: Path, settings: Sequence[Setting], copies: int, seed: int) -> None:
    """Upcycling, stage 1, and every stage 2 that starts from it."""
    start = run.run / f"upcycled-{copies}-seed-{seed}"
    seeded = ("--seed", str(seed))
    experts = ("--num-new-experts", str(NUM_NEW_EXPERTS), "--topk", str(TOPK), "--original-copies", str(copies))
    base = demo / "base-hf"
    steps.convert(run, start.name, base, start, *experts, *seeded, files=[base])
    name = stage1_name(copies, seed)
    train(run, name, "stage1", start, demo, {"expanded": 1}, *seeded)
    for setting in settings:
        if setting.copies == copies:
            options = (*seeded, "--lpr-loss-coeff", f"{setting.gamma:g}")
            train(run, stage2_name(setting, seed), "stage2", run.run / name, demo, REVIEW_BLEND, *options)


def train(
    run: Steps, name: str, stage: str, start: Path, demo: Path, blend: Mapping[str, float], *options: str
) -> None:
    """Train a stage from the folder `start`, which is named like the step that wrote it."""
    corpora = [demo / "data" / f"{group}_text_document.{end}" for group in blend for end in ("bin", "idx", "lang")]
    steps.train(
        run, name, stage, start, demo / "data", blend, *options,
        made_from=[start.name], files=corpora, recipe=stage, ranks=1,
    )  # fmt: skip


def copies_label(copies: int) -> str:
    return "1 copy (the paper)" if copies == 1 else f"{copies} copies"


def stage1_name(copies: int, seed: int) -> str:
    return f"stage1-{copies}-seed-{seed}"


def stage2_name(setting: Setting, seed: int) -> str:
    return f"{setting.name}-seed-{seed}"


def model_names(settings: Sequence[Setting], seeds: Iterable[int]) -> list[str]:
    """Names of the trained models, stage 1 before the stages 2 that started from it."""
    names = [name for seed in seeds for s in settings for name in (stage1_name(s.copies, seed), stage2_name(s, seed))]
    return list(dict.fromkeys(names))


def write_results(run: Path, settings: Sequence[Setting], seeds: Sequence[int]) -> None:
    """Write frontier.json, frontier.md and frontier.svg."""
    names_of = {}
    for copies in dict.fromkeys(setting.copies for setting in settings):
        label = f"{copies_label(copies)}, after stage 1"
        names_of[f"stage1-{copies}"] = label, [stage1_name(copies, seed) for seed in seeds]
    for setting in settings:
        names_of[setting.name] = setting.label, [stage2_name(setting, seed) for seed in seeds]
    results = {"seeds": list(seeds), "settings": read_evaluation(run / "evaluation", names_of)}
    write_text(run / FILE_NAME, json.dumps(results, indent=1) + "\n")
    write_text(run / "frontier.md", results_tables(results) + "\n")
    write_text(run / "frontier.svg", frontier_chart(results) + "\n")
    print(results_tables(results))


if __name__ == "__main__":
    run_command(main)
