"""What a report is made from: run folders, results per language, verified conversions, and claims."""

import math
import statistics
import time
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from moelpr.errors import UserError
from moelpr.files import parse_json
from moelpr.report.plots import Curve, Interval, percent
from moelpr.run_folder import COMMAND_FILE, FINISHED_FILE, METRICS_FILE, VERSIONS_FILE, read_json, read_settings
from moelpr.run_metrics import Record, RunMetrics, mean_of, read_run_metrics
from moelpr.yaml_files import read_mapping

ENDS = 50  # first and last steps of a run whose values per layer are kept
GROUPS = ("expanded", "original")
_STALE_S = 600.0  # a run that wrote nothing for this long, and for 20 of its steps, has stopped


@dataclass(frozen=True)
class Run:
    """A run folder. settings, versions and arguments are empty if it has none (older versions wrote none)."""

    folder: Path
    metrics: RunMetrics
    settings: dict[str, Any] = field(default_factory=dict)
    versions: dict[str, str] = field(default_factory=dict)
    arguments: list[str] = field(default_factory=list)
    num_ranks: int | None = None
    is_finished: bool = False
    last_record_age_s: float = 0.0

    @property
    def name(self) -> str:
        return self.folder.resolve().name

    @property
    def stage(self) -> str:
        return str(self.last.get("stage") or self.settings.get("stage") or "training")

    @property
    def last(self) -> Record:
        """The record of the last step; empty before the first."""
        return self.metrics.steps[-1] if self.metrics.steps else {}

    @property
    def step(self) -> int:
        return int(self.last.get("iteration", 0))

    @property
    def num_steps(self) -> int | None:
        """Steps when the run is finished; None if unknown."""
        steps = self.settings.get("train_iters")
        return steps if isinstance(steps, int) else None

    @property
    def progress(self) -> str:
        """The step in words: "20 of 100"."""
        return f"{self.step:,} of {self.num_steps:,}" if self.num_steps else f"{self.step:,}"

    @property
    def tokens_per_s(self) -> float | None:
        return self.median("tokens_per_s")

    def median(self, key: str) -> float | None:
        """Over all steps except the first, which includes the start of the program."""
        values = [record[key] for record in self.metrics.steps[1:] if record.get(key)]
        return statistics.median(values) if values else None

    @property
    def time_left_s(self) -> float:
        """Until the last step; 0 if unknown."""
        return max(0, (self.num_steps or 0) - self.step) * (self.median("step_time_s") or 0.0)

    @property
    def training_time_s(self) -> float:
        """Of all recorded steps; a step repeated after an interruption counts once."""
        return sum(record.get("step_time_s") or 0.0 for record in self.metrics.steps)

    @property
    def peak_memory_gib(self) -> float | None:
        return max((record.get("peak_memory_gib") or 0.0 for record in self.metrics.steps), default=0.0) or None

    @property
    def state(self) -> str:
        """finished, running or stopped."""
        patience = max(_STALE_S, 20 * (self.median("step_time_s") or 0.0))
        return "finished" if self.is_finished else "running" if self.last_record_age_s < patience else "stopped"


def read_run(folder: Path) -> Run:
    """Raises UserError if the folder has no metrics.jsonl, or a damaged one."""
    metrics_file = folder / METRICS_FILE
    if not folder.is_dir():
        raise UserError(f"there is no folder {folder}; pass a run folder (the --save folder of training)")
    if not metrics_file.exists():
        runs = " ".join(sorted(str(path.parent) for path in folder.glob(f"*/{METRICS_FILE}")))
        if runs:
            raise UserError(
                f"{folder} is a folder of runs, without {METRICS_FILE}; use `python -m moelpr.report {runs}`"
            )
        raise UserError(f"{folder} contains no {METRICS_FILE}; pass the folder of a run that has made a step")
    command = read_json(folder / COMMAND_FILE) or {}
    arguments, num_ranks = command.get("arguments"), command.get("num_ranks")
    return Run(
        folder,
        read_run_metrics(metrics_file, layers_at_ends=ENDS),
        settings=read_settings(folder) or {},
        versions=read_json(folder / VERSIONS_FILE) or {},
        arguments=[str(argument) for argument in arguments] if isinstance(arguments, list) else [],
        num_ranks=num_ranks if isinstance(num_ranks, int) else None,
        is_finished=(folder / FINISHED_FILE).exists(),
        last_record_age_s=time.time() - metrics_file.stat().st_mtime,
    )


def curve_of(records: Iterable[Mapping[str, Any]], key: str, name: str = "") -> Curve:
    """The steps that logged `key` as a finite number, or as one number per layer, of which the mean is taken."""
    points = [(record["iteration"], mean_of(record.get(key))) for record in records]
    known = [(x, y) for x, y in points if y is not None and math.isfinite(y)]
    return Curve(name, [x for x, _ in known], [y for _, y in known])


# Fractions of tokens in evaluations and, by language group, in metrics -> what the tokens do.
ROUTING_SHARES = {
    "original_first_share": "first choice is an original expert",
    "all_original_share": "choices are all original experts",
}


@dataclass
class Results:
    """Bits per byte of models, in the order in which they were made: from evaluations, or from validation passes."""

    # Language -> "original" or "expanded"; "" if the evaluation did not name the original languages.
    groups: dict[str, str] = field(default_factory=dict)
    # Model -> language, "mean original" or "mean expanded" -> bits per byte.
    bits: dict[str, dict[str, Interval]] = field(default_factory=dict)
    # The same, relative to the first model; missing ones follow from `bits`.
    changes: dict[str, dict[str, Interval]] = field(default_factory=dict)
    has_start: bool = True  # the first model is the start that changes are measured against
    per_token: set[str] = field(default_factory=set)  # languages of unknown size in bytes: their `bits` are per token
    # Name in ROUTING_SHARES -> model -> language -> fraction of tokens, per MoE layer.
    routing: dict[str, dict[str, dict[str, list[float]]]] = field(
        default_factory=lambda: {k: {} for k in ROUTING_SHARES}
    )
    layers: dict[str, list[int]] = field(default_factory=dict)  # model -> numbers of its MoE layers
    # Language -> {"prompt", "reference", "by_model": model -> text}.
    continuations: dict[str, dict[str, Any]] = field(default_factory=dict)

    @property
    def models(self) -> list[str]:
        return list(self.bits)

    def languages(self, *groups: str) -> list[str]:
        return [language for group in groups for language, its_group in self.groups.items() if its_group == group]

    def rows(self) -> dict[str, list[str]]:
        """Group -> its languages with results, then their mean if there is one."""
        known = {row for rows in self.bits.values() for row in rows}
        rows = {group: [*self.languages(group), f"mean {group}"] for group in (*GROUPS, "")}
        return {group: found for group, names in rows.items() if (found := [name for name in names if name in known])}

    def value(self, model: str, row: str) -> Interval:
        """Bits per byte; NaN if not measured."""
        return self.bits[model].get(row, Interval(math.nan))

    def change(self, model: str, row: str, reference: str | None = None) -> Interval:
        """Relative change against `reference`, by default the first model; NaN if one of them was not measured."""
        first = self.models[0]
        if reference in (None, first) and row in self.changes.get(model, {}):
            return self.changes[model][row]
        base = self.value(reference or first, row).value
        return Interval(self.value(model, row).value / base - 1 if base else math.nan)


def held_out_results(runs: Sequence[Run]) -> Results:
    """The first validation pass of the first run that has one, and the last pass of every run.

    Runs may differ in languages.
    """
    results = Results(has_start=False)
    for run in (run for run in runs if run.metrics.validations):
        first, last = run.metrics.validations[0], run.metrics.validations[-1]
        passes = {f"after {run.name}": last}
        if not results.bits and first["iteration"] == 0:  # in an old or truncated file the start is unknown
            results.has_start = True
            passes = {f"before {run.name}": first} | passes
        for name, record in passes.items():
            values = results.bits.setdefault(name, {})
            for language, result in record["languages"].items():
                results.groups[language] = result.get("group", "original")
                units = [unit for unit in ("bits_per_byte", "bits_per_token") if result.get(unit) is not None]
                if units:
                    values[language] = Interval(result[units[0]])
                    results.per_token |= {language} if units[0] == "bits_per_token" else set()
    return results


def read_evaluations(paths: Iterable[Path]) -> Results:
    """All files together, later ones adding to earlier ones. Raises UserError for a file of something else."""
    results = Results()
    for path in paths:
        with _named("--evaluation", path, "a JSON file that `python -m moelpr.evaluate` wrote"):
            _add(results, parse_json(path.read_bytes()))
    return results


@contextmanager
def _named(flag: str, path: Path, expected: str) -> Iterator[None]:
    """A file that is missing or not what is expected becomes a UserError that names its flag."""
    try:
        yield
    except OSError as error:
        raise UserError(f"{flag} {path} cannot be read: {error.strerror}") from error
    except (ValueError, TypeError, LookupError, AttributeError, ArithmeticError, RecursionError) as error:
        raise UserError(f"{flag} {path} must be {expected} ({error})") from error


def _add(results: Results, content: Mapping[str, Any]) -> None:
    original = list(content.get("original_languages") or [])
    reference = next(iter(content["models"]), None)
    for language, sample in (content.get("continuations") or {}).items():
        texts = sample["prompt"], sample["reference"], *sample["by_model"].values()
        if not all(isinstance(text, str) for text in texts):
            raise ValueError(f"the continuation of {language} is not text")
        results.continuations[language] = sample
    for model, result in content["models"].items():
        for language in result["languages"]:
            results.groups[language] = GROUPS[language in original] if original else results.groups.get(language, "")
        for row, values in {**result["languages"], **(result.get("means") or {})}.items():
            if "bits_per_byte" in values:
                results.bits.setdefault(model, {})[row] = _interval(values["bits_per_byte"])
            # Another file may compare with another model; changes against the first one then follow from `bits`.
            if "bits_per_byte" in (values.get("change") or {}) and reference == next(iter(results.bits), reference):
                results.changes.setdefault(model, {})[row] = _interval(values["change"]["bits_per_byte"])
            share = values.get("original_expert_share") or {}
            if per_layer := values.get("original_first_share") or share.get("per_layer"):
                results.routing["original_first_share"].setdefault(model, {})[row] = _floats(per_layer)
                layers = list(values.get("layers") or share.get("layers") or range(len(per_layer)))
                if not len(per_layer) == len(layers) == len(results.layers.setdefault(model, layers)):
                    raise ValueError(f"the layers of {model} on {row} are not those of its other results")
            if per_layer := values.get("all_original_share"):
                results.routing["all_original_share"].setdefault(model, {})[row] = _floats(per_layer)
                if len(per_layer) != len(results.layers.get(model, per_layer)):
                    raise ValueError(f"the layers of {model} on {row} are not those of its other results")


def _interval(content: Any) -> Interval:
    """From value, low and high, or from a plain number, as older versions wrote it."""
    is_plain = not isinstance(content, Mapping)
    return Interval(*_floats([content] if is_plain else [content.get(name) for name in Interval._fields]))


def _floats(values: Iterable[float | None]) -> list[float]:
    numbers = [math.nan if value is None else float(value) for value in values]
    return [number if math.isfinite(number) else math.nan for number in numbers]


def read_verifications(paths: Iterable[Path]) -> dict[str, dict[str, Any]]:
    """File name without its suffix -> the last JSON line that `checkpoint_convert/verify.py --json` printed."""
    checks = {}
    for path in paths:
        with _named("--verification", path, "the output of `checkpoint_convert/verify.py A B --json`"):
            lines = [line for line in path.read_text(encoding="utf-8").splitlines() if line.startswith("{")]
            check = parse_json(lines[-1])
            names = ("same_next_token", "max_abs_diff", "max_abs_logit_diff")
            check |= {name: float(check[name]) for name in names if check.get(name) is not None}
            checks[path.stem] = {**check, "equal": bool(check["equal"]), "num_tensors": int(check["num_tensors"])}
    return checks


def check_result(check: Mapping[str, Any]) -> str:
    """The result of verify.py in words."""
    keys = {"max_abs_diff": "tensor", "max_abs_logit_diff": "logit"}
    found = {name: check[key] for key, name in keys.items() if key in check}
    parts = [f"{name} {'Inf or NaN' if value is None else f'{value:.2g}'}" for name, value in found.items()]
    return f"largest difference of a {' and of a '.join(parts)}" if parts else "not measured"


# Measure of a claim -> number of models it names, value from the changes in bits per byte of all but the last model
# against the last.
_MEASURES: dict[str, tuple[int, Callable[..., float]]] = {
    "change": (2, lambda change: change),
    # The fraction of the second model's increase that the first one undoes.
    "undone": (3, lambda left, lost: 1 - left / lost if lost > 0 else math.nan),
    "lead": (3, lambda ours, theirs: theirs - ours),
}


@dataclass(frozen=True)
class Judgment:
    """A claim about one language, or a check (language ""), and whether the numbers show it."""

    name: str
    language: str
    claim: str
    found: str
    value: float
    ok: bool


@dataclass
class Claims:
    """Claims about models, from a YAML file like examples/demo-claims.yaml."""

    title: str = ""  # the report's title if every claim is shown
    note: str = ""  # a paragraph for the report
    # Each with name, claim (a sentence), languages ("original" or "expanded"), one of `_MEASURES` with its models, and
    # at_least or at_most.
    claims: Sequence[Mapping[str, Any]] = ()
    checks: dict[str, str] = field(default_factory=dict)  # name of a verification -> what it compares

    @classmethod
    def read(cls, path: Path) -> "Claims":
        """Raises UserError for an incomplete claim and for a field that does not exist."""
        content = read_mapping(path, "claims")
        if unknown := [str(key) for key in content if key not in cls.__dataclass_fields__]:
            raise UserError(
                f"--claims {path}: unknown key {', '.join(unknown)}; expected a file like examples/demo-claims.yaml"
            )
        expected = (
            f"claims with name, claim, languages ({' or '.join(GROUPS)}), one of {', '.join(_MEASURES)} with its "
            "models, and one of at_least, at_most"
        )
        with _named("--claims", path, expected):
            claims = cls(**content)
            for claim in claims.claims:
                (measure,) = _MEASURES.keys() & claim.keys()
                (bound,) = {"at_least", "at_most"} & claim.keys()
                is_complete = claim["claim"] and claim["name"] and claim["languages"] in GROUPS
                has_models = is_complete and len(claim[measure]) == _MEASURES[measure][0]
                if not has_models or not float(claim[bound]) < math.inf:
                    raise ValueError(claim["name"])
        return claims

    def judge(self, results: Results, checks: Mapping[str, Mapping[str, Any]]) -> list[Judgment]:
        """Every claim for every language of its group, then every check. What was not measured is not shown.

        Raises UserError if a claim is about a model or a group of languages without results.
        """
        judgments = [judgment for claim in self.claims for judgment in _judge(claim, results)]
        for name, meaning in self.checks.items():
            check = checks.get(name, {})
            judgments.append(Judgment(name, "", meaning, check_result(check), math.nan, check.get("equal", False)))
        return judgments


def _judge(claim: Mapping[str, Any], results: Results) -> Iterator[Judgment]:
    (measure,) = _MEASURES.keys() & claim.keys()
    *models, reference = claim[measure]
    languages = results.languages(claim["languages"])
    if not languages:
        raise UserError(
            f"the claim {claim['name']} needs results of {claim['languages']} languages; pass --evaluation with a file "
            "of `python -m moelpr.evaluate --original-languages ...`"
        )
    if unknown := [model for model in claim[measure] if model not in results.models]:
        raise UserError(
            f"the claim {claim['name']} is about {', '.join(unknown)}, which is not in --evaluation; choose from "
            f"{', '.join(results.models)}"
        )
    for language in languages:
        changes = [results.change(model, language, reference).value for model in models]
        value = _MEASURES[measure][1](*changes)
        found = ", ".join(f"{model} {percent(change)}" for model, change in zip(models, changes, strict=True))
        ok = value >= claim["at_least"] if "at_least" in claim else value <= claim["at_most"]
        yield Judgment(claim["name"], language, claim["claim"], f"{found} against {reference}", value, bool(ok))
