"""Learning against forgetting: both stages from the demo's base, for several settings and seeds.

    python -m examples.frontier --demo runs/demo --run runs/frontier

Writes `<run>/frontier.json`, `frontier.md` and `frontier.svg`. Every task is a command, as in the demo; finished
ones are skipped. Two models are trained at a time, each on one rank.
"""

import os
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path

from examples.demo_tasks import REVIEW_BLEND, TOPK, evaluate, expert_options, train
from examples.frontier_results import Frontier, frontier_chart, read_evaluation, results_tables
from examples.tasks import ROOT, convert
from moelpr.base.command import CommandParser, run_command
from moelpr.base.errors import UserError
from moelpr.base.files import write_text
from moelpr.model.stages import Stage1Experts
from moelpr.project.workflow.task import Task
from moelpr.project.workflow.workflow import Workflow


@dataclass(frozen=True)
class Setting:
    """One way to train. Settings with the same `Chain` share stage 1 of a seed."""

    chain: "Chain"
    gamma: float  # --lpr-loss-coeff
    steps: int | None = None  # In stage 2; the recipe has others by default.

    @property
    def name(self) -> str:
        places = "copy" if self.chain.copies == 1 else "copies"
        return f"{self.chain.name}-{places}-gamma-{self.gamma:g}" + (f"-steps-{self.steps}" if self.steps else "")

    @property
    def label(self) -> str:
        return f"{self.chain.label}, \u03b3 {self.gamma:g}" + (f", {self.steps} steps" if self.steps else "")


@dataclass(frozen=True)
class Chain:
    """What stage 1 depends on, apart from the seed."""

    copies: int  # C, --original-copies
    stage1_experts: Stage1Experts = "all"

    @property
    def name(self) -> str:
        return f"{self.copies}-new" if self.stage1_experts == "new" else str(self.copies)

    @property
    def label(self) -> str:
        copies = "1 copy (the paper)" if self.copies == 1 else f"{self.copies} copies"
        return copies + (", stage 1 with new experts only" if self.stage1_experts == "new" else "")


NEW = Chain(TOPK, "new")
SETTINGS = [Setting(Chain(copies), gamma) for copies in (1, TOPK) for gamma in (0.03, 0.1, 0.3)]
SETTINGS += [Setting(NEW, gamma) for gamma in (0.1, 0.3, 0.6)] + [Setting(NEW, 0.3, 600)]


def main() -> None:
    parser = CommandParser(description=__doc__.splitlines()[0])
    add, names = parser.add_argument, [setting.name for setting in SETTINGS]
    demo = "folder of the demo, of which base and corpora are used (default: %(default)s)"
    add("--demo", type=Path, default=Path("runs/demo"), metavar="DIR", help=demo)
    add("--run", type=Path, default=Path("runs/frontier"), metavar="DIR", help="output folder (default: %(default)s)")
    trained = f"settings to train (default: all: {', '.join(names)})"
    add("--settings", nargs="+", choices=names, metavar="NAME", help=trained)
    seeds = "seeds of routers and of the order of the text (default: 1 2 3)"
    add("--seeds", type=int, nargs="+", default=[1, 2, 3], metavar="N", help=seeds)
    args = parser.parse_args()
    os.chdir(ROOT)
    if not (args.demo / "logs" / "export-base.json").is_file():
        raise UserError(f"--demo {args.demo} contains no finished base; run make demo first")
    settings = [setting for setting in SETTINGS if not args.settings or setting.name in args.settings]
    chains = [(chain, seed) for seed in args.seeds for chain in dict.fromkeys(s.chain for s in settings)]
    trainings = [task for chain in chains for task in training_tasks(args.run, args.demo, settings, *chain)]
    evaluations = evaluation_tasks(args.run, args.demo, model_names(settings, args.seeds))
    run = Workflow(args.run, [*trainings, *evaluations])
    run.run(trainings, workers=2)
    run.run(evaluations)
    write_results(args.run, settings, args.seeds)


def training_tasks(run: Path, demo: Path, settings: Sequence[Setting], chain: Chain, seed: int) -> list[Task]:
    """Upcycling, stage 1, and every stage 2 that starts from it."""
    seeded = ("--seed", str(seed))

    def stage(save: Path, recipe: str, start: Path, blend: Mapping[str, float], *options: str) -> list[Task]:
        corpora = tuple(demo / "data" / f"{x}_text_document.{end}" for x in blend for end in ("bin", "idx", "lang"))
        made_from = (start.name,)
        return train(
            save, recipe, start, demo / "data", blend, *seeded, *options, made_from=made_from, files=corpora, ranks=1
        )

    base, start, stage1 = demo / "base-hf", run / f"upcycled-{chain.name}-seed-{seed}", run / stage1_name(chain, seed)
    found = [replace(convert(start, base, *expert_options(chain.copies), *seeded), files=(base,))]
    experts = ("--stage1-experts", "new") if chain.stage1_experts == "new" else ()
    found += stage(stage1, "stage1", start, {"expanded": 1}, *experts)
    for setting in settings:
        if setting.chain == chain:
            options = ["--lpr-loss-coeff", f"{setting.gamma:g}"]
            options += ["--train-iters", str(setting.steps)] if setting.steps else []
            found += stage(run / stage2_name(setting, seed), "stage2", stage1, REVIEW_BLEND, *options)
    return found


def evaluation_tasks(run: Path, demo: Path, names: Sequence[str]) -> list[Task]:
    """Bits per byte of all models and of the demo's base, and routing of all models."""
    models, exports = {name: run / f"{name}-hf" for name in names}, tuple(f"export-{name}" for name in names)
    base = demo / "base-hf"
    text = evaluate(run, "text", {"base": base} | models, demo / "corpus", made_from=exports)
    routing = evaluate(run, "routing", models, demo / "corpus", made_from=exports)
    return [replace(text, files=(*text.files, base)), routing]


def stage1_name(chain: Chain, seed: int) -> str:
    return f"stage1-{chain.name}-seed-{seed}"


def stage2_name(setting: Setting, seed: int) -> str:
    return f"{setting.name}-seed-{seed}"


def model_names(settings: Sequence[Setting], seeds: Iterable[int]) -> list[str]:
    """Names of the trained models, stage 1 before the stages 2 that started from it."""
    names = [name for seed in seeds for s in settings for name in (stage1_name(s.chain, seed), stage2_name(s, seed))]
    return list(dict.fromkeys(names))


def write_results(run: Path, settings: Sequence[Setting], seeds: Sequence[int]) -> None:
    """Write frontier.json, frontier.md and frontier.svg."""
    names_of = {}
    for chain in dict.fromkeys(setting.chain for setting in settings):
        label = f"{chain.label}, after stage 1"
        names_of[f"stage1-{chain.name}"] = label, [stage1_name(chain, seed) for seed in seeds]
    for setting in settings:
        names_of[setting.name] = setting.label, [stage2_name(setting, seed) for seed in seeds]
    results = Frontier([*seeds], read_evaluation(run / "evaluation", names_of))
    results.write(run)
    write_text(run / "frontier.md", results_tables(results) + "\n")
    write_text(run / "frontier.svg", frontier_chart(results) + "\n")
    print(results_tables(results))


if __name__ == "__main__":
    run_command(main)
