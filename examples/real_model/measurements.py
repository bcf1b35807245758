"""From the queue's folder to the numbers of the page, `real-model.json`.

Under `settings`, each setting that is done has its `label`, its `cost`, and an entry per seed in `models`: the `change`
of bits per byte against base per text ("el.help": language and kind) and, in `means`, per group of languages, on kinds
of text that were trained on ("in") and on the others ("out"). All are [value, low, high], with 95% intervals over
documents, paired with base.
"""

import json
import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np

from examples.real_model.settings import (
    BASE,
    BATCH,
    EXPANDED,
    LANGUAGES,
    ORIGINAL,
    RATES,
    SEQUENCE_LENGTH,
    SETTINGS,
    STAGE1_RATE,
    STAGE2_RATE,
    Setting,
)
from examples.real_model.tasks import best_rate, searched_changes
from moelpr.errors import UserError
from moelpr.evaluate.results import Estimate, estimates, interval_of, mean
from moelpr.evaluate.scoring import LanguageScore
from moelpr.run_metrics import read_run_metrics

Json = dict[str, Any]
GROUPS = {"original": ORIGINAL, "expanded": EXPANDED}
ROUTED = ("copies-stage1", "copies")  # settings whose routing is shown
DIGITS = 5


def collect(run: Path) -> Json:
    """All numbers of the settings that are done.

    Raises:
        UserError: not even the base has been evaluated.
    """
    facts = json.loads((run / "corpus" / "facts.json").read_text(encoding="utf-8"))
    base = read_scores(run, BASE)
    if not base:
        raise UserError(f"{run} has no evaluation of the base; start the queue first: python -m examples.real_model")
    kinds = {"in": facts["trained"], "out": facts["untrained"]}
    texts = [f"{language}.{kind}" for kind in (*kinds["in"], *kinds["out"]) for language in LANGUAGES]
    results: Json = {
        "kinds": kinds,
        "text": {key: facts.get(key) for key in ("sources", "languages")},
        "base": {
            text: _rounded(interval_of(estimates({BASE: base[text]}, 1, text)[BASE]["bits_per_byte"])) for text in texts
        },
        "settings": {},
        "missing": [],
    }
    for setting in SETTINGS.values():
        scores = [(model, read_scores(run, model)) for model in setting.models]
        done = {model: found for model, found in scores if found.keys() >= set(texts)}
        if setting.name == BASE:
            continue
        if not done:
            results["missing"] += [] if setting.is_extra else [setting.label]
            continue
        results["settings"][setting.name] = {
            "label": setting.label,
            "models": {model: changes(base, found, kinds) for model, found in done.items()},
            "cost": cost(run, setting),
        }
        if len(done) < len(setting.models):
            left = f"{len(setting.models) - len(done)} of {len(setting.models)} seeds"
            results["missing"].append(f"{setting.label}: {left}")
    results["routing"] = routing(run, kinds["out"])
    results["continuations"] = _json(run / "continuations" / "results.json").get("continuations", {})
    results["cloze"] = cloze(_json(run / "scores" / "harness.json"))
    return results


def read_scores(run: Path, model: str) -> dict[str, LanguageScore]:
    """Text -> score of a model; {} if it has not been evaluated."""
    files = sorted((run / "evaluation" / "parts" / model).glob("*.json"))
    return {path.stem: LanguageScore.from_json(_json(path)["result"]) for path in files}


def changes(base: Mapping[str, LanguageScore], model: Mapping[str, LanguageScore], kinds: Mapping[str, Any]) -> Json:
    """A model against base: per text, and means over kinds and languages of a group."""
    found: dict[str, Estimate] = {}
    for text in [f"{language}.{kind}" for part in kinds.values() for kind in part for language in LANGUAGES]:
        bits = estimates({"base": base[text], "model": model[text]}, 1, text)
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
    """What training its first model took: its own run, and stage 1 before."""
    trained, whole, tokens, seconds, memory = 0, 0, 0, 0.0, 0.0
    for name in setting.runs:
        steps = read_run_metrics(run / name / "metrics.jsonl").steps
        tokens += BATCH * SEQUENCE_LENGTH * len(steps)
        seconds += sum(step["step_time_s"] for step in steps)
        memory = max(memory, *(step["peak_memory_gib"] or 0.0 for step in steps))
        now, of = parameters((run / "logs" / f"{name}.log").read_text(encoding="utf-8"))
        trained, whole = max(trained, now), max(whole, of)
    family = "full" if setting.name == "full" else "lora"
    is_searched = setting.name == "full" or setting.name.startswith("lora")
    rates = [best_rate(run, setting.name)] if is_searched else [STAGE1_RATE, STAGE2_RATE][: len(setting.runs)]
    found = {
        "trained_parameters": trained,
        "parameters": whole,
        "tokens": tokens,
        "minutes": round(seconds / 60, 1),
        "peak_memory_gib": round(memory, 1),
        "rates": rates,
    }
    if is_searched:
        searched = searched_changes(run, setting.name)
        found["searched"] = {f"{rate:g}": round(change, DIGITS) for rate, change in searched.items()}
        found["is_at_edge"] = rates[0] in (min(RATES[family]), max(RATES[family]))
    return found


def parameters(log: str) -> tuple[int, int]:
    """Trained parameters, and all of the model, that a run printed."""
    table = re.search(r"^all +([\d,]+) +([\d,]+)$", log, re.MULTILINE)
    lora = re.search(r"([\d,]+) trained parameters of ([\d,]+)", log)
    if table:
        trained, frozen = (int(number.replace(",", "")) for number in table.groups())
        return trained, trained + frozen
    if not lora:
        raise UserError("a log of the queue does not say how many parameters were trained; run that step again")
    return int(lora[1].replace(",", "")), int(lora[2].replace(",", ""))


def routing(run: Path, kinds: list[str]) -> Json:
    """Setting -> layers and, per language and layer, how many choices are original experts on these kinds of text."""
    found = {}
    for name in ROUTED:
        model = SETTINGS[name].models[0]
        scores = read_scores(run, model)
        if not scores:
            continue
        found[name] = {"layers": _routed(scores, LANGUAGES[0], kinds[0]).layers}
        for share in ("original_first_share", "all_original_share"):
            found[name][share] = {
                language: np.mean([getattr(_routed(scores, language, kind), share) for kind in kinds], axis=0)
                .round(4)
                .tolist()
                for language in LANGUAGES
            }
    return found


def cloze(harness: Json) -> Json:
    """Model -> benchmark -> language -> [score, standard error], in percent."""
    return {
        model: {
            name: {x: [round(score["value"], 2), round(score["stderr"], 2)] for x, score in by_language.items()}
            for name, by_language in result["scores"].items()
        }
        for model, result in harness.get("models", {}).items()
    }


def _routed(scores: Mapping[str, LanguageScore], language: str, kind: str) -> Any:
    return scores[f"{language}.{kind}"].routing


def _rounded(interval: Any) -> list[float]:
    return [round(number, DIGITS) for number in interval]


def _json(path: Path) -> Json:
    return json.loads(path.read_text(encoding="utf-8")) if path.is_file() else {}
