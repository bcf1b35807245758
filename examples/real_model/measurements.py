"""From the queue's folder to the numbers of the page, `real-model.json`.

Under `settings` and `vocabulary`, each setting that is done has its `label`, its `cost`, and an entry per seed in
`models`: the `change` of bits per byte against base per text ("el.help": language and kind) and, in `means`, per group
of languages, on kinds of text that were trained on ("in") and on the others ("out"). All are [value, low, high], with
95% intervals over documents, paired with base.

The numbers of several folders add up: `merged` takes over what another folder has measured of the same comparison, so
that one machine can train some settings and another the others.
"""

import json
import math
import re
from collections.abc import Mapping, Sequence
from pathlib import Path
from statistics import median
from typing import Any

import numpy as np

from examples.languages import GROUPS, LANGUAGES, held_out_files
from examples.real_model.rates import searched_changes
from examples.real_model.settings import (
    BASE,
    BATCH,
    RATES,
    SEQUENCE_LENGTH,
    SETTINGS,
    VOCABULARY,
    VOCABULARY_START,
    Setting,
)
from examples.real_model.text import Facts
from examples.real_model.unseen_results import BASE_TOLERANCE, collect_unseen, wrong_language
from moelpr.base.errors import UserError
from moelpr.base.run_folder import read_json
from moelpr.measure.evaluate.confidence import Estimate, estimates, interval_of, mean
from moelpr.measure.evaluate.result_cache import cached_results
from moelpr.measure.evaluate.scoring import LanguageScore
from moelpr.measure.report.numbers import Interval
from moelpr.model.metrics.run_metrics import read_run_metrics
from moelpr.model.metrics.schema import LEARNING_RATE, PEAK_MEMORY_GIB, ROUTING_SHARES, STEP_TIME_S

Json = dict[str, Any]
ROUTED = ("copies-stage1", "copies")  # settings whose routing is shown
DIGITS = 5


def collect(run: Path) -> Json:
    """All numbers of the settings that are done.

    Raises:
        UserError: the text is missing or damaged, or not even the base has been evaluated.
    """
    facts = Facts.read(run / "corpus")
    base = read_scores(run, BASE)
    if not base:
        raise UserError(f"{run} has no evaluation of the base; run make results first")
    kinds = {"in": facts.trained, "out": facts.untrained}
    texts = texts_of(kinds)
    if not base.keys() >= {*texts}:
        raise UserError(f"the evaluation of the base in {run} is not complete; rerun make results")
    documents = document_names(run / "corpus", facts.kinds, texts)

    def measured(settings: Mapping[str, Setting]) -> Json:
        found = {}
        for setting in settings.values():
            scores = {model: read_scores(run, model) for model in setting.models}
            done = {model: score for model, score in scores.items() if score.keys() >= {*texts}}
            for score in done.values():
                check_same_documents(run, documents, score)
            if done and setting.name != BASE:
                models = {model: changes(base, score, kinds, documents) for model, score in done.items()}
                found[setting.name] = {"label": setting.label, "models": models, "cost": cost(run, setting)}
        return found

    return {
        "kinds": kinds,
        "text": {"sources": facts.sources, "languages": facts.languages},
        "tokens": queue_tokens(run),
        "base": {
            text: _rounded(interval_of(estimates({BASE: base[text]}, 1)[BASE]["bits_per_byte"])) for text in texts
        },
        "settings": measured(SETTINGS),
        "vocabulary": measured(VOCABULARY),
        "bytes_per_token": {
            name: bytes_per_token(found)
            for name, model in {"base": BASE, "extended": VOCABULARY_START}.items()
            if (found := read_scores(run, model)).keys() >= {*texts}
        },
        "routing": routing(run, kinds["out"]),
        "continuations": (read_json(run / "continuations" / "results.json") or {}).get("continuations", {}),
        "wrong_language": wrong_language(run),
        "unseen": collect_unseen(run),
    }


def merged(results: Json, before: Json) -> Json:
    """`results` and what only `before` has measured: settings, seeds, routing, continuations and scores of models.

    Raises:
        UserError: `before` is of other text, another number of tokens or another base.
    """
    if not before:
        return results
    same = [results.get(key) == before.get(key) for key in ("kinds", "tokens")]
    pairs = [(results["base"].get(text, [math.inf])[0], bits[0]) for text, bits in before["base"].items()]
    if not all(same) or any(abs(new - old) > BASE_TOLERANCE * old for new, old in pairs):
        raise UserError(
            "the numbers so far are of another base, other text or another number of tokens; remove the file that "
            "holds them to start again"
        )
    found = {**results, "bytes_per_token": before["bytes_per_token"] | results["bytes_per_token"]}
    for family, settings in (("settings", SETTINGS), ("vocabulary", VOCABULARY)):
        found[family] = {
            name: _merged_setting(results[family].get(name), before[family].get(name))
            for name in settings
            if name in results[family] or name in before[family]
        }
    found["routing"] = before["routing"] | results["routing"]
    found["wrong_language"] = results["wrong_language"] or before.get("wrong_language", {})
    if old := before.get("unseen"):
        new = results["unseen"] or old
        found["unseen"] = {**new, "settings": old["settings"] | new["settings"]}
    found["continuations"] = before["continuations"] | results["continuations"]
    for prompt in before["continuations"].keys() & results["continuations"].keys():
        old, new = before["continuations"][prompt], results["continuations"][prompt]
        found["continuations"][prompt] = {**new, "by_model": old["by_model"] | new["by_model"]}
    return found


def _merged_setting(new: Json | None, old: Json | None) -> Json | None:
    """The cost is that of the first seed, so of the part that has it."""
    if new is None or old is None:
        return new or old
    models = old["models"] | new["models"]
    return {**new, "models": dict(sorted(models.items())), "cost": new["cost"] or old["cost"]}


def missing(results: Json) -> list[str]:
    """Settings and seeds that have not been measured, in words."""
    found = []
    for family, settings in (("settings", SETTINGS), ("vocabulary", VOCABULARY)):
        for setting in settings.values():
            models = results[family].get(setting.name, {"models": {}})["models"]
            if not models and setting.name != BASE and not setting.is_extra:
                found.append(setting.label)
            elif models and len(models) < setting.seeds:
                found.append(f"{setting.label}: {setting.seeds - len(models)} of {setting.seeds} seeds")
    return found


def texts_of(kinds: Mapping[str, Any]) -> list[str]:
    """Names of all held-out texts: "el.help"."""
    return [f"{language}.{kind}" for kind in (*kinds["in"], *kinds["out"]) for language in LANGUAGES]


def queue_tokens(run: Path) -> int | None:
    """The --tokens that the queue of a folder was started with."""
    found = re.search(r"--tokens (\d+)", _queue_settings(run))
    return int(found[1]) if found else None


def is_short(run: Path) -> bool:
    """Whether the queue of a folder was started with --short."""
    return "--short" in _queue_settings(run)


def is_plain(run: Path) -> bool:
    """Whether the base of a folder was trained on plain text."""
    return "--plain" in _queue_settings(run)


def _queue_settings(run: Path) -> str:
    path = run / "queue.txt"
    return path.read_text("utf-8", errors="replace") if path.is_file() else ""


def bytes_per_token(scores: Mapping[str, LanguageScore]) -> dict[str, float]:
    """Language -> UTF-8 bytes per token of its held-out texts."""
    found = {}
    for language in LANGUAGES:
        its = [score for text, score in scores.items() if text.split(".")[0] == language]
        size, tokens = (sum(sum(getattr(score, key)) for score in its) for key in ("document_bytes", "document_tokens"))
        found[language] = round(size / tokens, 3)
    return found


def read_scores(run: Path, model: str) -> dict[str, LanguageScore]:
    """Text -> score of a model; {} if it has not been evaluated."""
    results = cached_results(run / "evaluation", model)
    return {text: LanguageScore.from_json(result) for text, result in results.items()}


def document_names(corpus: Path, kinds: Sequence[str], texts: Sequence[str]) -> dict[str, list[str]]:
    """Text -> the IDs of its held-out documents: the same ID in two languages is the same document, translated."""
    files = held_out_files(corpus, kinds)
    try:
        return {text: [json.loads(line)["id"] for line in files[text].open(encoding="utf-8")] for text in texts}
    except (OSError, ValueError, KeyError, TypeError):
        raise UserError(f"held-out text in {corpus} is damaged; remove {corpus} and rerun make results") from None


def check_same_documents(run: Path, documents: Mapping[str, list[str]], scores: Mapping[str, LanguageScore]) -> None:
    """UserError if a model was evaluated on other text than the run has."""
    if any(len(scores[text].document_bits) != len(names) for text, names in documents.items()):
        folder = run / "evaluation"
        raise UserError(f"{folder} is of other text than {run / 'corpus'}; remove {folder} and rerun make results")


def changes(
    base: Mapping[str, LanguageScore],
    model: Mapping[str, LanguageScore],
    kinds: Mapping[str, Sequence[str]],
    documents: Mapping[str, list[str]],
) -> Json:
    """A model against base: per text, and means over kinds and languages of a group.

    `documents`: of `document_names`; translations are drawn together.
    """
    found: dict[str, Estimate] = {}
    population = sorted({name for names in documents.values() for name in names})
    for text in texts_of(kinds):
        bits = estimates({"base": base[text], "model": model[text]}, 1, documents[text], population)
        found[text] = bits["model"]["bits_per_byte"] / bits["base"]["bits_per_byte"] - 1
    means = {
        part: {
            group: _rounded(interval_of(mean([found[f"{language}.{kind}"] for kind in its for language in languages])))
            for group, languages in GROUPS.items()
        }
        for part, its in kinds.items()
    }
    return {"change": {text: _rounded(interval_of(change)) for text, change in found.items()}, "means": means}


def cost(run: Path, setting: Setting) -> Json:
    """What training its first model took, with the runs before; {} if this folder lacks records of them."""
    records = {name: (run / name / "metrics.jsonl", run / "logs" / f"{name}.log") for name in setting.runs}
    if not records or not all(path.is_file() for paths in records.values() for path in paths):
        return {}
    trained, whole, tokens, seconds, memory = 0, 0, 0, 0.0, 0.0
    rates = []  # what the runs used; a search may have been extended since
    for metrics, log in records.values():
        steps = read_run_metrics(metrics).steps
        found_parameters = parameters(log.read_text(encoding="utf-8", errors="replace"))
        if found_parameters is None or not steps:
            return {}
        try:
            seconds += len(steps) * median(step[STEP_TIME_S] for step in steps)
            memory = max(memory, *(step[PEAK_MEMORY_GIB] or 0.0 for step in steps))
            rates.append(float(f"{max(step[LEARNING_RATE] for step in steps):g}"))
        except (KeyError, TypeError):
            raise UserError(f"{metrics} is damaged; remove it, and the page has no costs of {setting.name}") from None
        tokens += BATCH * SEQUENCE_LENGTH * len(steps)
        trained, whole = max(trained, found_parameters[0]), max(whole, found_parameters[1])
    found = {
        "trained_parameters": trained,
        "parameters": whole,
        "tokens": tokens,
        "minutes": round(seconds / 60, 1),
        "peak_memory_gib": round(memory, 1),
        "rates": rates,
    }
    if searched := searched_changes(run, setting.name):
        found["searched"] = {f"{rate:g}": round(change, DIGITS) for rate, change in searched.items()}
        found["is_at_edge"] = rates[0] in (min(RATES[setting.name]), max(RATES[setting.name]))
    return found


def parameters(log: str) -> tuple[int, int] | None:
    """Trained parameters, and all of the model, that the last start of a run printed; None if none did."""
    table = re.findall(r"^all +([\d,]+) +([\d,]+)$", log, re.MULTILINE)  # trained, frozen
    lora = re.findall(r"([\d,]+) trained parameters of ([\d,]+)", log)
    if not table and not lora:
        return None
    trained, other = (int(number.replace(",", "")) for number in [*table, *lora][-1])
    return trained, trained + other if table else other


def routing(run: Path, kinds: list[str]) -> Json:
    """Setting -> layers and, per language and layer, how many choices are original experts on these kinds of text."""
    found = {}
    for name in ROUTED:
        model = SETTINGS[name].models[0]
        scores = read_scores(run, model)
        if not scores.keys() >= {*texts_of({"in": [], "out": kinds})}:
            continue
        found[name] = {"layers": _routed(scores, LANGUAGES[0], kinds[0]).layers}
        for share in ROUTING_SHARES:
            found[name][share] = {
                language: np.mean([getattr(_routed(scores, language, kind), share) for kind in kinds], axis=0)
                .round(4)
                .tolist()
                for language in LANGUAGES
            }
    return found


def _routed(scores: Mapping[str, LanguageScore], language: str, kind: str) -> Any:
    return scores[f"{language}.{kind}"].routing


def _rounded(interval: Interval) -> list[float]:
    return [round(number, DIGITS) for number in (interval.value, interval.low, interval.high)]
