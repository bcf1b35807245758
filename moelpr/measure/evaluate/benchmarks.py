"""Tables of benchmarks: which of lm-evaluation-harness's tasks measure a language, and the score that they give."""

import math
import re
import zlib
from collections.abc import Mapping, Sequence
from dataclasses import replace
from functools import cache
from importlib import metadata
from pathlib import Path
from statistics import fmean
from typing import Annotated, Any

import numpy as np
from numpy.typing import NDArray
from pydantic import BeforeValidator, Field
from pydantic.dataclasses import dataclass

from moelpr.base import records
from moelpr.base.errors import UserError
from moelpr.base.languages import canonical, is_code
from moelpr.base.records import STRICT
from moelpr.base.versions import install_command
from moelpr.base.yaml_files import read_mapping
from moelpr.measure.evaluate.confidence import NUM_SAMPLES, Estimate, mean

PAPER_TASKS = Path(__file__).with_name("paper_tasks.yaml")
# Fractions in the harness's results; others (chrf, bleu) are percentages already.
FRACTIONS = ("acc", "acc_norm", "exact_match", "f1")
# lm-eval's tasks beyond the paper's table, without examples in the prompt: metric, and forms of names with the code.
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
DOCUMENTS = "documents"  # a key of a task: metric → the number of each question

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

    def stderr(self, language: str, numbers: Mapping[str, Mapping[str, Any]]) -> float:
        """The standard error of a language's score, from 0 to 100 as in the paper; NaN if the harness has none.

        `numbers`: task -> metric -> number.
        """
        tasks, scale = self.tasks[language], 100.0 if self.metric in FRACTIONS else 1.0
        for task in tasks:
            if self.metric not in numbers[task]:
                metrics = [name for name in numbers[task] if not name.endswith("_stderr") and name != DOCUMENTS]
                raise UserError(
                    f"{task} has the metrics {', '.join(metrics)}, but not {self.metric}; correct the --tasks file"
                )
        errors = [numbers[task].get(f"{self.metric}_stderr", math.nan) for task in tasks]
        return scale * sum(error**2 for error in errors) ** 0.5 / len(errors)

    def estimate(self, language: str, by_task: Mapping[str, Mapping[str, Any]]) -> Estimate:
        """The value, and what it is in samples of the questions, the same for every model.

        Tasks with the same number of questions get the same samples, because they may be translations. Where the
        harness has no number for each question, as for chrF, the samples have the standard error.
        """
        scale = 100.0 if self.metric in FRACTIONS else 1.0
        samples = []
        for task in self.tasks[language]:
            value, numbers = by_task[task][self.metric], by_task[task].get(DOCUMENTS, {}).get(self.metric, [])
            if len(numbers) > 1:
                times = _samples(len(numbers)) @ np.array(numbers) / len(numbers)
                times += value - fmean(numbers)  # a group may weight its tasks
            else:
                rng = np.random.default_rng([_SEED, zlib.crc32(repr((task, sorted(by_task[task].items()))).encode())])
                times = value + by_task[task].get(f"{self.metric}_stderr", math.nan) * rng.standard_normal(NUM_SAMPLES)
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

    benchmarks = read_benchmarks(PAPER_TASKS, languages, needs_one=False)
    names = sorted(TaskManager().all_tasks)
    for benchmark, (metric, form) in _MORE.items():
        tasks: dict[str, list[str]] = {}
        for match in filter(None, (re.fullmatch(form, name) for name in names)):
            code = canonical({"jp": "ja"}.get(match[1], match[1]))
            if is_code(code) and code in languages:
                tasks.setdefault(code, [match[0]])
        if tasks:
            benchmarks[benchmark] = Benchmark(0, metric, tasks)
    return benchmarks


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
