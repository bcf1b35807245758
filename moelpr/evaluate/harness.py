"""The paper's benchmarks, run by lm-evaluation-harness: a table of tasks, one result per model and task, averages.

Each task's result is cached as it comes, with what every question scored, so that changes are paired. Scores have the
form of the paper's Table 1: a row per model, a column per benchmark, a table per group of languages.
"""

import logging
import math
import multiprocessing
import re
import zlib
from collections.abc import Iterator, Mapping, Sequence
from concurrent.futures import ProcessPoolExecutor
from dataclasses import asdict, replace
from functools import cache, partial
from importlib import metadata
from pathlib import Path
from statistics import fmean
from typing import Annotated, Any

import numpy as np
import torch
from numpy.typing import NDArray
from pydantic import BeforeValidator, Field
from pydantic.dataclasses import dataclass

from moelpr.evaluate.confidence import NUM_SAMPLES, Estimate, interval_of, mean
from moelpr.evaluate.models import LoadedModel, choose_device, open_model, require_hf, resolve_dtype
from moelpr.evaluate.result_cache import Json, ResultCache, fingerprint_files, fingerprint_model
from moelpr.evaluate.results import Results
from moelpr.languages import canonical, is_code, language_name
from moelpr.process.errors import UserError, first_line
from moelpr.process.versions import install_command
from moelpr.report.numbers import Interval, signed
from moelpr.report.page import Table
from moelpr.store import records
from moelpr.store.checksums import Verify
from moelpr.store.records import STRICT
from moelpr.store.yaml_files import read_mapping

PAPER_TASKS = Path(__file__).with_name("paper_tasks.yaml")
# Fractions in the harness's results; others (chrf, bleu) are percentages already.
FRACTIONS = ("acc", "acc_norm", "exact_match", "f1")
GROUPS = ("expanded", "original")
# What lm-eval has beyond the paper's table, without examples in the prompt: metric, and forms of names with the code.
_MORE = {
    "XCOPA": ("acc", "x?copa_([a-z]{2})"),
    "XStoryCloze": ("acc", "xstorycloze_([a-z]{2})"),
    "XNLI": ("acc", "xnli_([a-z]{2})"),
    "XWinograd": ("acc", "xwinograd_([a-z]{2})"),
    "PAWS-X": ("acc", "paws_([a-z]{2})"),
    "TruthfulQA": ("acc", "truthfulqa_([a-z]{2})_mc2"),
    "PIQA": ("acc_norm", "piqa_([a-z]{2})"),
}
_SEED = 1  # decides the samples of questions
_DOCUMENTS = "documents"
_CACHED = "harness "  # before a task: the name of its result in the cache

# model -> task -> {metric or metric_stderr: number; "documents": {metric: the number of each question}}
Scores = dict[str, dict[str, dict[str, Any]]]


# A single name needs no list.
TaskNames = Annotated[
    list[str], Field(min_length=1), BeforeValidator(lambda found: [found] if isinstance(found, str) else found)
]


@dataclass(frozen=True, config=STRICT)
class Benchmark:
    """One column of the paper's Table 1, as in a table of tasks.

    Attributes:
        num_fewshot: The number of examples before each question.
        metric: The key in the harness's results.
        tasks: Language -> the harness's task, or several, of which the mean counts.
    """

    num_fewshot: Annotated[int, Field(ge=0)]
    metric: str
    tasks: dict[str, TaskNames]

    def score(self, language: str, found: Mapping[str, Mapping[str, Any]]) -> dict[str, float]:
        """The language's value and stderr, from 0 to 100 as in the paper; `found`: task -> metric -> number.

        A stderr that the harness does not know is NaN.
        """
        tasks, scale = self.tasks[language], 100.0 if self.metric in FRACTIONS else 1.0
        for task in tasks:
            if self.metric not in found[task]:
                metrics = [name for name in found[task] if not name.endswith("_stderr") and name != _DOCUMENTS]
                raise UserError(
                    f"{task} has the metrics {', '.join(metrics)}, but not {self.metric}; correct the --tasks file"
                )
        errors = [found[task].get(f"{self.metric}_stderr", math.nan) for task in tasks]
        stderr = scale * sum(error**2 for error in errors) ** 0.5 / len(errors)
        return {"value": scale * fmean(found[task][self.metric] for task in tasks), "stderr": stderr}

    def estimate(self, language: str, found: Mapping[str, Mapping[str, Any]]) -> Estimate:
        """The value, and what it is in samples of the questions, the same for every model.

        Tasks with the same number of questions get the same samples, because they may be translations. Where the
        harness has no number for each question, as for chrF, the samples have the standard error.
        """
        scale = 100.0 if self.metric in FRACTIONS else 1.0
        samples = []
        for task in self.tasks[language]:
            value, numbers = found[task][self.metric], found[task].get(_DOCUMENTS, {}).get(self.metric, [])
            if len(numbers) > 1:
                times = _samples(len(numbers)) @ np.array(numbers) / len(numbers)
                times += value - fmean(numbers)  # a group may weight its tasks
            else:
                rng = np.random.default_rng([_SEED, zlib.crc32(repr((task, sorted(found[task].items()))).encode())])
                times = value + found[task].get(f"{self.metric}_stderr", math.nan) * rng.standard_normal(NUM_SAMPLES)
            samples.append(scale * np.append(value, times))
        return mean(samples)


@cache
def _samples(number: int) -> NDArray[np.float64]:
    """How often each of the questions is drawn: [NUM_SAMPLES, number]."""
    rng = np.random.default_rng([_SEED, number])
    return rng.multinomial(number, np.full(number, 1 / number), size=NUM_SAMPLES).astype(np.float32)


def installed_benchmarks(languages: Sequence[str]) -> dict[str, Benchmark]:
    """The paper's benchmarks, and others that the installed harness has for one of the languages.

    Raises:
        UserError: The harness is not installed.
    """
    harness_version()
    from lm_eval.tasks import TaskManager

    found = read_benchmarks(PAPER_TASKS, languages, needs_one=False)
    names = sorted(TaskManager().all_tasks)
    for benchmark, (metric, form) in _MORE.items():
        tasks: dict[str, list[str]] = {}
        for match in filter(None, (re.fullmatch(form, name) for name in names)):
            code = canonical({"jp": "ja"}.get(match[1], match[1]))
            if is_code(code) and code in languages:
                tasks.setdefault(code, [match[0]])
        if tasks:
            found[benchmark] = Benchmark(0, metric, tasks)
    return found


def harness_version() -> str:
    try:
        return metadata.version("lm_eval")
    except metadata.PackageNotFoundError as error:
        raise UserError(f"lm-evaluation-harness is not installed; run {install_command('eval')}") from error


def read_benchmarks(path: Path, languages: Sequence[str], *, needs_one: bool = True) -> dict[str, Benchmark]:
    """Read a table of tasks (see paper_tasks.yaml), keeping `languages` and the benchmarks that have one of them."""
    remedy = f"pass --tasks a table of num_fewshot, metric and tasks per benchmark, as in {PAPER_TASKS.name}"
    table = records.validate(dict[str, Benchmark], read_mapping(path, "table of tasks"), str(path), remedy)
    benchmarks = {}
    for name, entry in table.items():
        # YAML reads the Norwegian code as a boolean.
        names = {canonical("no" if code == "false" else code): names for code, names in entry.tasks.items()}
        if "nb" in names:
            names.setdefault("no", names["nb"])  # Norwegian, which is mostly written as Bokmål
        if tasks := {language: names[language] for language in languages if language in names}:
            benchmarks[name] = replace(entry, tasks=tasks)
    if needs_one and not benchmarks:
        raise UserError(
            f"{path} has no task for {', '.join(languages)}; pass other --languages or another --tasks file"
        )
    shots_of(benchmarks)
    return benchmarks


def shots_of(benchmarks: Mapping[str, Benchmark]) -> dict[str, int]:
    """The number of examples in the prompt of each task; a UserError if two benchmarks disagree."""
    shots: dict[str, int] = {}
    for benchmark in benchmarks.values():
        for task in (task for tasks in benchmark.tasks.values() for task in tasks):
            if shots.setdefault(task, benchmark.num_fewshot) != benchmark.num_fewshot:
                raise UserError(
                    f"two benchmarks of --tasks have the task {task}, with {shots[task]} and {benchmark.num_fewshot} "
                    "shots; use two tables, and another --output for each"
                )
    return shots


def run_tasks(
    models: Mapping[str, Path],
    benchmarks: Mapping[str, Benchmark],
    cache: ResultCache,
    settings: Mapping[str, Any],
    verify: Verify = Verify.FULL,
    num_processes: int = 1,
) -> Scores:
    """Run every task on every model (name -> Hugging Face directory), one model after another.

    Args:
        num_processes: Processes that share what is missing in the cache, each with a GPU of its own if there are GPUs.
        settings: "include_path" (folder with additional task files, or None), "limit" (questions per task, None for
            all), "batch_size", and "device" and "dtype" of `moelpr.evaluate.models.load_model`.

    Raises:
        UserError: before a model is loaded, if lm_eval is missing, or a task is unknown or has no data.
    """
    require_hf(models, "lm-evaluation-harness")
    version = harness_version()
    dtype = resolve_dtype(settings["dtype"], choose_device(settings["device"]))
    of: Json = {"lm_eval": version, "limit": settings["limit"], "dtype": dtype, "include_path": None}
    if folder := settings["include_path"]:
        if not folder.is_dir():
            raise UserError(f"--include-path {folder} is not a folder; pass one with task files")
        of["include_path"] = fingerprint_files(file for file in folder.rglob("*") if file.suffix != ".pyc")
    shots = shots_of(benchmarks)
    keys: dict[str, dict[str, Json]] = {}  # model -> what its results are computed from, by name in the cache
    for name, directory in models.items():
        of["model"] = fingerprint_model(directory)
        keys[name] = {_CACHED + task: {**of, "num_fewshot": count} for task, count in shots.items()}
    missing = [
        task
        for task in shots
        if any(cache.read(name, _CACHED + task, by_task[_CACHED + task]) is None for name, by_task in keys.items())
    ]
    if num_processes > 1 and len(missing) > 1:
        _run_shares(num_processes, models, benchmarks, missing, cache, settings, verify)
        missing = []
    manager, tasks = load_tasks(missing, settings["include_path"]) if missing else (None, {})
    for name in tasks:
        # The harness would use 0 with a message that is easily missed.
        if shots[name] and any(_fixes_no_shots(task) for task in tasks[name]):
            raise UserError(
                f"the task {name} sets num_fewshot to 0, and --tasks wants {shots[name]} shots; state 0 there, or "
                "remove it from the task"
            )

    def measure(name: str, names: list[str]) -> Iterator[tuple[str, Json]]:
        with open_model(models[name], settings["device"], settings["dtype"], verify) as loaded:
            for task in (cached.removeprefix(_CACHED) for cached in names):
                print(f"{name}: {task}, {shots[task]} shots", flush=True)
                yield _CACHED + task, _evaluate(loaded, manager, tasks[task], task, shots[task], settings)

    results = {name: cache.complete(name, keys[name], partial(measure, name)) for name in models}
    return {name: {task: found[_CACHED + task] for task in shots} for name, found in results.items()}


def _run_shares(
    number: int,
    models: Mapping[str, Path],
    benchmarks: Mapping[str, Benchmark],
    missing: Sequence[str],
    cache: ResultCache,
    settings: Mapping[str, Any],
    verify: Verify,
) -> None:
    """Run the missing tasks in several processes, which put each result into the cache."""
    if cache.is_off:
        raise UserError("--num-processes requires --output, where the processes leave their results")
    number, gpus = min(number, len(missing)), torch.cuda.device_count()
    with ProcessPoolExecutor(number, mp_context=multiprocessing.get_context("spawn")) as pool:
        runs = []
        for place in range(number):
            own = {task: "" for task in missing[place::number]}
            share = {
                name: replace(benchmark, tasks=tasks)
                for name, benchmark in benchmarks.items()
                if (
                    tasks := {
                        code: kept
                        for code, names in benchmark.tasks.items()
                        if (kept := [n for n in names if n in own])
                    }
                )
            }
            device = f"cuda:{place % gpus}" if gpus and settings["device"] in ("auto", "cuda") else settings["device"]
            runs.append(pool.submit(run_tasks, dict(models), share, cache, {**settings, "device": device}, verify))
        for run in runs:
            run.result()


def _fixes_no_shots(task: Any) -> bool:
    return hasattr(task, "get_config") and task.get_config("num_fewshot") == 0  # a group has no settings


def load_tasks(names: Sequence[str], include_path: Path | None) -> tuple[Any, dict[str, list[Any]]]:
    """The harness's index of tasks, and each of `names` (tasks or groups) with its data, as the harness's objects."""
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
    tasks = {}
    for name in names:
        try:
            found = manager.load([name])
        except Exception as error:  # datasets raises errors of its own, and a task may run code of its own
            raise UserError(
                f"the data of task {name} are unavailable: {first_line(error)}; run once with network access to fill "
                "the cache, or omit the task in a --tasks file of your own"
            ) from error
        tasks[name] = [found["groups"][name]] if name in found["groups"] else [*found["tasks"].values()]
    return manager, tasks


def _evaluate(
    loaded: LoadedModel, manager: Any, task: list[Any], name: str, num_fewshot: int, settings: Mapping[str, Any]
) -> Json:
    """The numbers among the task's results: "acc", "acc_stderr", ..., and those of its questions."""
    import lm_eval
    from lm_eval.models.huggingface import HFLM

    logging.getLogger("lm_eval").setLevel(logging.ERROR)
    found = lm_eval.simple_evaluate(
        model=HFLM(pretrained=loaded.model, tokenizer=loaded.tokenizer, batch_size=settings["batch_size"]),
        tasks=task,
        task_manager=manager,  # without it, all tasks are indexed again
        num_fewshot=num_fewshot,
        limit=settings["limit"],
        log_samples=True,
        bootstrap_iters=1000,
    )
    results = found["results"].get(name, {})  # empty for a group that does not aggregate its tasks
    numbers: Json = {
        key.partition(",")[0]: float(value)
        for key, value in results.items()
        if key.endswith(",none") and isinstance(value, int | float)
    }
    questions = [row for rows in found.get("samples", {}).values() for row in sorted(rows, key=lambda r: r["doc_id"])]
    by_metric = {metric: [row.get(metric) for row in questions] for metric in numbers if not metric.endswith("_stderr")}
    kept = {metric: values for metric, values in by_metric.items() if all(isinstance(v, int | float) for v in values)}
    return numbers | {_DOCUMENTS: {metric: list(map(float, values)) for metric, values in kept.items() if values}}


class HarnessResults(Results):
    """Scores from 0 to 100; the first model is the reference."""

    name, title = "harness", "Benchmarks"

    def __init__(
        self,
        models: Mapping[str, Path],
        benchmarks: Mapping[str, Benchmark],
        languages: Sequence[str],
        original: Sequence[str],
        scores: Scores,
        settings: Mapping[str, Any],
    ) -> None:
        self._models, self._benchmarks, self._settings = models, benchmarks, settings
        self._reference = next(iter(models))
        self._groups = {
            group: [language for language in languages if (language in original) == (group == "original")]
            for group in GROUPS
        }
        # model -> benchmark -> language -> {value, stderr}
        self._scores = {
            model: {
                name: {code: benchmark.score(code, found) for code in benchmark.tasks}
                for name, benchmark in benchmarks.items()
            }
            for model, found in scores.items()
        }
        self._estimates = {
            model: {
                name: {code: benchmark.estimate(code, found) for code in benchmark.tasks}
                for name, benchmark in benchmarks.items()
            }
            for model, found in scores.items()
        }

    def _average(self, model: str, group: str) -> Estimate | None:
        """The average of a group: the mean over benchmarks of means over languages; None if there is no score."""
        by_benchmark = [
            [found for language, found in by_language.items() if language in self._groups[group]]
            for by_language in self._estimates[model].values()
        ]
        means = [mean(found) for found in by_benchmark if found]
        return mean(means) if means else None

    def change(self, model: str, group: str) -> Interval | None:
        """The change of a group's average from the first model, paired by question; None for that model itself."""
        ours, theirs = self._average(model, group), self._average(self._reference, group)
        return None if model == self._reference or ours is None or theirs is None else interval_of(ours - theirs)

    def means(self, model: str, group: str) -> list[float | None]:
        """The row of the paper's Table 1.

        It has the mean score per benchmark over the group's languages (None if it covers none), then their mean.
        """
        by_benchmark = [
            [score["value"] for language, score in scores.items() if language in self._groups[group]]
            for scores in self._scores[model].values()
        ]
        means = [fmean(values) if values else None for values in by_benchmark]
        found = [mean for mean in means if mean is not None]
        return [*means, fmean(found) if found else None]

    def _change(self, model: str, group: str) -> str:
        """The change of the average from the first model in words; "" for that model itself."""
        found = self.change(model, group)
        unclear = " unclear" if found and found.has_bounds and not found.is_clear else ""
        return found.text(signed) + unclear if found else ""

    def findings(self) -> list[str]:
        findings = [
            f"{group.capitalize()} languages: {model} has {self.means(model, group)[-1]:.2f} on average, {change} "
            f"against {self._reference}."
            for group in GROUPS
            for model in self._models
            if (change := self._change(model, group))
        ]
        for name, benchmark in self._benchmarks.items():
            languages = [language for group in self._groups.values() for language in group]
            if missing := [language_name(language) for language in languages if language not in benchmark.tasks]:
                findings.append(f"{name} has no task for {', '.join(missing)}.")
        return findings

    def tables(self) -> dict[str, Table]:
        groups = {
            f"{group.capitalize()} languages": self._group_table(group) for group in GROUPS if self._groups[group]
        }
        return groups | {
            f"{name}, {benchmark.num_fewshot} shots, {benchmark.metric}": self._language_table(name, benchmark)
            for name, benchmark in self._benchmarks.items()
        }

    def _group_table(self, group: str) -> Table:
        rows = []
        for model in self._models:
            cells = ["\u2013" if mean is None else f"{mean:.2f}" for mean in self.means(model, group)]
            rows.append([model, *cells, self._change(model, group)])
        header = [f"{name} ({benchmark.num_fewshot})" for name, benchmark in self._benchmarks.items()]
        names = ", ".join(map(language_name, self._groups[group]))
        note = (
            f"Means over {names}, as far as a benchmark has them; in parentheses: shots; in brackets: 95% confidence "
            "intervals, paired by question. A change whose interval contains 0 is unclear."
        )
        return Table(["model", *header, "average", f"against {self._reference}"], rows, note)

    def _language_table(self, name: str, benchmark: Benchmark) -> Table:
        rows = [[model, *(self._cell(model, name, code) for code in benchmark.tasks)] for model in self._models]
        names = ", ".join(task for tasks in benchmark.tasks.values() for task in tasks)
        limit = self._settings["limit"]
        warning = f" Only the first {limit} questions of each task: do not publish these numbers." if limit else ""
        note = f"\u00b1 one standard error; then the change against {self._reference} with its 95% interval."
        return Table(["model", *benchmark.tasks], rows, f"{note} Tasks: {names}.{warning}")

    def _cell(self, model: str, name: str, code: str) -> str:
        change = self._changes(model, name, code)
        return _with_error(self._scores[model][name][code]) + (f"; {change.text(signed)}" if change else "")

    def _changes(self, model: str, name: str, code: str) -> Interval | None:
        if model == self._reference:
            return None
        return interval_of(self._estimates[model][name][code] - self._estimates[self._reference][name][code])

    def _score_json(self, model: str, name: str, code: str) -> Json:
        found, change = interval_of(self._estimates[model][name][code]), self._changes(model, name, code)
        clear = {"change": asdict(change) | {"is_clear": change.is_clear}} if change else {}
        return self._scores[model][name][code] | {"low": found.low, "high": found.high} | clear

    def to_json(self) -> dict[str, Any]:
        include_path = self._settings["include_path"]
        return {
            "settings": {**self._settings, "include_path": include_path and str(include_path)},
            "groups": self._groups,
            "benchmarks": {name: asdict(benchmark) for name, benchmark in self._benchmarks.items()},
            "models": {
                model: {
                    "directory": str(directory),
                    "scores": {
                        name: {code: self._score_json(model, name, code) for code in found}
                        for name, found in self._scores[model].items()
                    },
                    "averages": {group: self.means(model, group)[-1] for group in GROUPS},
                    "average_changes": {g: asdict(found) for g in GROUPS if (found := self.change(model, g))},
                }
                for model, directory in self._models.items()
            },
        }


def _with_error(score: Mapping[str, float]) -> str:
    stderr = "\u2013" if math.isnan(score["stderr"]) else f"{score['stderr']:.2f}"
    return f"{score['value']:.2f} \u00b1 {stderr}"
