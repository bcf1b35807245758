"""The paper's benchmarks, run by lm-evaluation-harness: a table of tasks, one result per model and task, averages.

Each task's result is cached as it comes. Scores have the form of the paper's Table 1: a row per model, a column per
benchmark, a table per group of languages.
"""

import logging
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from importlib import metadata
from pathlib import Path
from statistics import fmean
from typing import Any

from moelpr.errors import UserError
from moelpr.evaluate.compare import ResultCache, fingerprint_files, fingerprint_model
from moelpr.evaluate.models import LoadedModel, is_megatron, load_model
from moelpr.evaluate.results import Results
from moelpr.languages import language_name
from moelpr.report.page import Table
from moelpr.yaml_files import read_mapping

PAPER_TASKS = Path(__file__).with_name("paper_tasks.yaml")
# Fractions in the harness's results; others (chrf, bleu) are percentages already.
FRACTIONS = ("acc", "acc_norm", "exact_match", "f1")
GROUPS = ("expanded", "original")

# model -> task -> {metric or metric_stderr: number}
Scores = dict[str, dict[str, dict[str, float]]]


@dataclass(frozen=True)
class Benchmark:
    """One column of the paper's Table 1."""

    name: str
    num_fewshot: int  # examples before each question
    metric: str  # key in the harness's results
    tasks: dict[str, tuple[str, ...]]  # language -> the harness's task names, whose mean is the language's score

    def score(self, language: str, found: Mapping[str, Mapping[str, float]]) -> dict[str, float]:
        """The language's value and stderr, from 0 to 100 as in the paper; `found`: task -> metric -> number."""
        tasks, scale = self.tasks[language], 100.0 if self.metric in FRACTIONS else 1.0
        for task in tasks:
            if self.metric not in found[task]:
                metrics = [name for name in found[task] if not name.endswith("_stderr")]
                raise UserError(
                    f"the metric of {self.name} must be one of {', '.join(metrics)}, which {task} has, got "
                    f"{self.metric}; correct the --tasks file"
                )
        errors = [found[task].get(f"{self.metric}_stderr", 0.0) for task in tasks]
        stderr = sum(error**2 for error in errors) ** 0.5 / len(errors)
        return {"value": scale * fmean(found[task][self.metric] for task in tasks), "stderr": scale * stderr}


def read_benchmarks(path: Path, languages: Sequence[str]) -> list[Benchmark]:
    """Read a table of tasks (see paper_tasks.yaml), keeping only `languages` and benchmarks that have one of them.

    Raises:
        UserError: the file is not such a table, or nothing is left.
    """
    try:
        benchmarks = []
        for name, entry in read_mapping(path, "table of tasks").items():
            # YAML reads the Norwegian code as a boolean.
            tasks = {"no" if key is False else key: names for key, names in entry["tasks"].items()}
            chosen = {
                language: (tasks[language],) if isinstance(tasks[language], str) else tuple(tasks[language])
                for language in languages
                if language in tasks
            }
            if chosen:
                benchmarks.append(Benchmark(str(name), int(entry["num_fewshot"]), str(entry["metric"]), chosen))
    except UserError:
        raise
    except (AttributeError, KeyError, TypeError, ValueError) as error:
        reason = str(error).replace("\n", " ")
        raise UserError(
            f"{path} is not a table of tasks ({reason}); each benchmark requires num_fewshot, metric and tasks, as in "
            f"{PAPER_TASKS.name}"
        ) from error
    if not benchmarks:
        raise UserError(
            f"{path} has no task for {', '.join(languages)}; pass other --languages or another --tasks file"
        )
    return benchmarks


@dataclass(frozen=True)
class HarnessSettings:
    """How tasks are run."""

    include_path: Path | None = None  # folder with additional task files
    limit: int | None = None  # questions per task; None: all
    batch_size: int = 8
    device: str = "auto"
    dtype: str = "auto"


def run_tasks(
    models: Mapping[str, Path], benchmarks: Sequence[Benchmark], settings: HarnessSettings, cache: ResultCache
) -> Scores:
    """Run every task on every model (name -> Hugging Face directory), one model after another.

    Raises:
        UserError: before a model is loaded, if lm_eval is missing, or a task is unknown or has no data.
    """
    if checkpoints := [name for name, directory in models.items() if is_megatron(directory)]:
        raise UserError(
            f"--model {checkpoints[0]} is a Megatron checkpoint, which lm-evaluation-harness does not support; export "
            "it with checkpoint_convert/mcore_to_hf.py"
        )
    try:
        version = metadata.version("lm_eval")
    except metadata.PackageNotFoundError as error:
        raise UserError("lm-evaluation-harness is not installed; run: python -m pip install '.[eval]'") from error
    of: dict[str, Any] = {"lm_eval": version, "limit": settings.limit, "dtype": settings.dtype, "include_path": None}
    if folder := settings.include_path:
        if not folder.is_dir():
            raise UserError(f"--include-path {folder} is not a folder; pass one with task files")
        of["include_path"] = fingerprint_files(file for file in folder.rglob("*") if file.suffix != ".pyc")
    shots = {task: bench.num_fewshot for bench in benchmarks for tasks in bench.tasks.values() for task in tasks}
    scores: Scores = {}
    keys: dict[str, dict[str, Any]] = {}  # model -> task -> key of its result
    for name, directory in models.items():
        model = fingerprint_model(directory)
        keys[name] = {task: {**of, "model": model, "num_fewshot": count} for task, count in shots.items()}
        cached = {task: cache.read(name, f"harness {task}", key) for task, key in keys[name].items()}
        scores[name] = {task: result for task, result in cached.items() if result is not None}
    missing = [task for task in shots if any(task not in found for found in scores.values())]
    if not missing:
        return scores
    manager = _task_manager(missing, settings.include_path)
    tasks = {task: _load_task(manager, task) for task in missing}
    for name, directory in models.items():
        todo = [task for task in shots if task not in scores[name]]
        loaded = load_model(directory, settings.device, settings.dtype) if todo else None
        for task in todo:
            assert loaded
            print(f"{name}: {task}, {shots[task]} shots", flush=True)
            scores[name][task] = _evaluate(loaded, manager, tasks[task], task, shots[task], settings)
            cache.write(name, f"harness {task}", keys[name][task], scores[name][task])
    return scores


def _task_manager(names: Sequence[str], include_path: Path | None) -> Any:
    """The harness's own index of tasks, with all of `names`."""
    from lm_eval.tasks import TaskManager

    include = str(include_path) if include_path else None
    manager = TaskManager(include_path=include, include_defaults=False) if include else None
    if manager is None or any(name not in manager.all_tasks for name in names):
        manager = TaskManager(include_path=include)  # reading the harness's 14,000 tasks takes many seconds
    if unknown := [name for name in names if name not in manager.all_tasks]:
        raise UserError(
            f"lm-evaluation-harness {metadata.version('lm_eval')} has no task {', '.join(unknown)}; correct the "
            "--tasks file, or pass the folder of your own tasks as --include-path"
        )
    return manager


def _load_task(manager: Any, name: str) -> list[Any]:
    """A task or group with its data, as the harness's own objects."""
    try:
        loaded = manager.load([name])
    except Exception as error:  # datasets raises errors of its own, and a task may run code of its own
        reason = str(error).strip().split("\n")[0].rstrip(".") or type(error).__name__
        raise UserError(
            f"the data of task {name} are unavailable: {reason}; run once with network access to fill the cache, or "
            "omit the task in a --tasks file of your own"
        ) from error
    return [loaded["groups"][name]] if name in loaded["groups"] else [*loaded["tasks"].values()]


def _evaluate(
    loaded: LoadedModel, manager: Any, task: list[Any], name: str, num_fewshot: int, settings: HarnessSettings
) -> dict[str, float]:
    """The numbers among the task's results: "acc", "acc_stderr", ..."""
    import lm_eval
    from lm_eval.models.huggingface import HFLM

    logging.getLogger("lm_eval").setLevel(logging.ERROR)
    found = lm_eval.simple_evaluate(
        model=HFLM(pretrained=loaded.model, tokenizer=loaded.tokenizer, batch_size=settings.batch_size),
        tasks=task, task_manager=manager,  # without it, all tasks are indexed again
        num_fewshot=num_fewshot, limit=settings.limit, log_samples=False, bootstrap_iters=1000,
    )  # fmt: skip
    results = found["results"].get(name, {})  # empty for a group that does not aggregate its tasks
    return {
        key.partition(",")[0]: float(value)
        for key, value in results.items()
        if key.endswith(",none") and isinstance(value, int | float)
    }


class HarnessResults(Results):
    """Scores from 0 to 100; the first model is the reference."""

    name, title = "harness", "Benchmarks"

    def __init__(
        self, models: Mapping[str, Path], benchmarks: Sequence[Benchmark], languages: Sequence[str],
        original: Sequence[str], scores: Scores, settings: HarnessSettings,
    ):  # fmt: skip
        self._models, self._benchmarks, self._settings = models, benchmarks, settings
        self._reference = next(iter(models))
        self._groups = {
            "expanded": [language for language in languages if language not in original],
            "original": [language for language in languages if language in original],
        }
        # model -> benchmark -> language -> {value, stderr}
        self._scores = {
            model: {
                bench.name: {lang: bench.score(lang, scores[model]) for lang in bench.tasks} for bench in benchmarks
            }
            for model in models
        }

    def benchmark_mean(self, model: str, benchmark: str, group: str) -> float | None:
        """Mean over the group's languages that the benchmark has; None if it has none."""
        scores = self._scores[model][benchmark]
        found = [scores[language]["value"] for language in self._groups[group] if language in scores]
        return fmean(found) if found else None

    def average(self, model: str, group: str) -> float | None:
        """Mean of the benchmarks' means, as in the paper's Table 1."""
        means = [self.benchmark_mean(model, benchmark.name, group) for benchmark in self._benchmarks]
        found = [value for value in means if value is not None]
        return fmean(found) if found else None

    def _change(self, model: str, group: str) -> str:
        """Change of the average from the first model, "" for that model itself."""
        ours, theirs = self.average(model, group), self.average(self._reference, group)
        if model == self._reference or ours is None or theirs is None:
            return ""
        return f"{ours - theirs:+.2f}".replace("-", "\u2212")

    def findings(self) -> list[str]:
        findings = [
            f"{group.capitalize()} languages: {model} has {self.average(model, group):.2f} on average, {change} "
            f"against {self._reference}."
            for group in GROUPS
            for model in self._models
            if (change := self._change(model, group))
        ]
        languages = [language for group in self._groups.values() for language in group]
        for benchmark in self._benchmarks:
            if missing := [language_name(language) for language in languages if language not in benchmark.tasks]:
                findings.append(f"{benchmark.name} has no task for {', '.join(missing)}.")
        return findings

    def tables(self) -> dict[str, Table]:
        groups = {
            f"{group.capitalize()} languages": self._group_table(group) for group in GROUPS if self._groups[group]
        }
        return groups | {
            f"{bench.name}, {bench.num_fewshot} shots, {bench.metric}": self._language_table(bench)
            for bench in self._benchmarks
        }

    def _group_table(self, group: str) -> Table:
        rows = []
        for model in self._models:
            means = [self.benchmark_mean(model, benchmark.name, group) for benchmark in self._benchmarks]
            numbers = [*means, self.average(model, group)]
            cells = ["\u2013" if number is None else f"{number:.2f}" for number in numbers]
            rows.append([model, *cells, self._change(model, group)])
        header = [f"{benchmark.name} ({benchmark.num_fewshot})" for benchmark in self._benchmarks]
        return Table(
            ["model", *header, "average", f"against {self._reference}"],
            rows,
            f"Means over {', '.join(map(language_name, self._groups[group]))}, as far as a benchmark has them; in "
            "parentheses: shots.",
        )

    def _language_table(self, benchmark: Benchmark) -> Table:
        rows = [
            [model, *("{value:.2f} \u00b1 {stderr:.2f}".format(**score) for score in scores[benchmark.name].values())]
            for model, scores in self._scores.items()
        ]
        names = ", ".join(name for tasks in benchmark.tasks.values() for name in tasks)
        limit = self._settings.limit
        warning = f" Only the first {limit} questions of each task: do not publish these numbers." if limit else ""
        return Table(["model", *benchmark.tasks], rows, f"\u00b1 one standard error. Tasks: {names}.{warning}")

    def to_json(self) -> dict[str, Any]:
        include_path = self._settings.include_path
        return {
            "settings": {**asdict(self._settings), "include_path": include_path and str(include_path)},
            "groups": self._groups,
            "benchmarks": {
                benchmark.name: {
                    "num_fewshot": benchmark.num_fewshot,
                    "metric": benchmark.metric,
                    "tasks": benchmark.tasks,
                }
                for benchmark in self._benchmarks
            },
            "models": {
                model: {
                    "directory": str(directory),
                    "scores": self._scores[model],
                    "averages": {group: self.average(model, group) for group in GROUPS},
                }
                for model, directory in self._models.items()
            },
        }
