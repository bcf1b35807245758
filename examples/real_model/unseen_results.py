"""What settings have learned, and what they keep of what neither training nor replay contains: numbers, table, picture.

All numbers leave out the first tokens of documents (`unseen.SKIPPED`). The two endpoints that decide are `learned`, the
expanded languages on a kind of text that was never trained on, and `unseen`, languages that no text of a setting has.
"""

from collections.abc import Mapping, Sequence
from pathlib import Path
from statistics import fmean
from typing import Any

from examples.languages import EXPANDED, ORIGINAL
from examples.real_model import settings, unseen
from examples.real_model.plain_text import UNSEEN_READ
from examples.real_model.settings import BASE, SEED_NAMES, SETTINGS
from moelpr.base import records
from moelpr.base.errors import UserError
from moelpr.base.run_folder import read_json
from moelpr.measure.evaluate.confidence import Estimate, estimates, interval_of, mean
from moelpr.measure.evaluate.result_cache import cached_results
from moelpr.measure.evaluate.scoring import LanguageScore
from moelpr.measure.report.evaluation_files import WrongLanguage, wrong_language_table
from moelpr.measure.report.numbers import Interval, number_text, percent
from moelpr.measure.report.page import Table, markdown_table
from moelpr.measure.report.plots import Series, trade_off_chart

Json = Mapping[str, Any]
Scores = Mapping[str, LanguageScore]
TEXTS = {
    "trained": [f"{x}.help" for x in EXPANDED],
    "learned": [f"{x}.interface" for x in EXPANDED],
    "original": [f"{x}.interface" for x in ORIGINAL],
    "unseen": [f"{x}.interface" for x in unseen.LANGUAGES],
    "read": [f"{x}.interface" for x in UNSEEN_READ],
    "code": ["code"],
    "arithmetic": ["arithmetic"],
    "long": ["long"],
    "mixed": [f"mixed.{x}" for x in EXPANDED],
}
ENDPOINTS = ("learned", "unseen")
COMPARED = "copies"  # the setting that the others are compared with
HEAD = {
    "trained": "expanded, a trained kind",
    "learned": "expanded, another kind",
    "original": "original, another kind",
    "unseen": "eight unseen languages",
    "code": "code",
    "arithmetic": "sums",
    "long": "2,048 tokens of English",
    "mixed": "mixed requests",
}
# Columns for a base that has read plain text.
PLAIN_HEAD = HEAD | {"read": f"those of them that it has read ({', '.join(UNSEEN_READ)})"}
# Line of the picture -> its settings: what someone weighs who has to choose.
CHART = {
    "MoE-LPR": {"MoE-LPR": "copies", "new experts only": "new"},
    "MoE-LPR, calibrated routers": {
        f"--max-distance {settings.MAX_DISTANCE:g}": settings.FAR,
        "instead of review": settings.LONG_CALIBRATED,
        "after review": "new-calibrated",
    },
    "full fine-tuning with replay text": {
        "10% replay": "full-10-0.0003",
        "1%": "full-1-0.0003",
        "none": "full-0-0.0003",
    },
    "only the FFNs fine-tuned": {"FFNs, 10% replay": "ffn-10"},
    "mean of base and full fine-tuning": {"half": "halfway", "35%": "near"},
    "LoRA, rank 16": {"LoRA, 10% replay": "lora-16-10-0.003"},
    "LoRA, rank 16, switched per request": {"switched": "lora-switched"},
}
# Row of the table for who has to choose -> its settings, which differ in their seed.
CHOICES = {
    "MoE-LPR, calibrated routers instead of review": [f"{settings.LONG_CALIBRATED}{name}" for name in SEED_NAMES],
    "the same, all eight languages among the kept text": [settings.KNOWN],
    f"the first with --max-distance {settings.MAX_DISTANCE:g}": [f"{settings.FAR}{name}" for name in SEED_NAMES],
    "MoE-LPR, review, K copies": ["copies"],
    "full fine-tuning, 10% replay text": [f"{settings.HALFWAY_OF}{name}" for name in SEED_NAMES],
    "its mean with the base": [settings.HALFWAY],
    "LoRA, rank 16, 10% replay text": ["lora-16-10-0.003"],
    "LoRA, rank 16, on for expanded languages only": [settings.LORA_SWITCHED],
}
DIGITS = 5
BASE_TOLERANCE = 1e-3  # relative difference of the base's numbers between machines


def collect_unseen(run: Path) -> dict[str, Any]:
    """The numbers of every setting whose first model has been evaluated; {} without the base."""
    scores = {name: _scores(run, setting.models[0]) for name, setting in SETTINGS.items()}
    base = scores.pop(BASE)
    if switched := scores.get(settings.SWITCHED):
        scores[settings.LORA_SWITCHED] = {text: switched[text] if _asks(text) else base[text] for text in switched}
    needed = {*unseen.files(run)}
    done = {name: found for name, found in scores.items() if found.keys() >= needed}
    if not base.keys() >= needed:
        return {}
    changes = {name: _changes(base, found) for name, found in done.items()}
    found = {}
    for name, score in done.items():
        against = changes.get(COMPARED)
        leads = {x: interval_of(changes[name][x] - against[x]) for x in ENDPOINTS} if against else {}
        found[name] = {
            "label": SETTINGS[name].label,
            "change": {text: _rounded(interval_of(change)) for text, change in changes[name].items()},
            "against": {} if name == COMPARED else {text: _rounded(lead) for text, lead in leads.items()},
            "repeated": {text: round(_repeated(score, text), DIGITS) for text in ("copying", "recall")},
            "routing": _routing(score),
        }
    repeated = {text: round(_repeated(base, text), DIGITS) for text in ("copying", "recall")}
    return {"base": repeated, "settings": found}


def collect_short(run: Path) -> dict[str, Any]:
    """All numbers of a short queue; {} without the base."""
    found = collect_unseen(run)
    return found | {"wrong_language": wrong_language(run)} if found else {}


def wrong_language(run: Path) -> Json:
    """Language -> model -> how often it goes on in another language; {} if that has not been measured."""
    return (read_json(run / "wrong-language" / "results.json") or {}).get("wrong_language", {})


def with_recorded(found: Json, recorded: Json) -> dict[str, Any]:
    """Numbers of a run, with those that were recorded of what it has not measured.

    Raises:
        UserError: They are of another base or of other text.
    """
    base = recorded.get("base", {})
    if any(abs(found["base"][text] - number) > BASE_TOLERANCE * number for text, number in base.items()):
        raise UserError("the numbers so far are of another base or other text; remove their file to start again")
    settings_found = {**recorded.get("settings", {}), **found["settings"]}
    return {
        **found,
        "settings": {name: settings_found[name] for name in SETTINGS if name in settings_found},
        "wrong_language": found["wrong_language"] or recorded.get("wrong_language", {}),
    }


def _asks(text: str) -> bool:
    """Whether a user of an expanded language asks, so that adapters would be on."""
    return unseen.is_expanded(text) or text.startswith("mixed")


def _scores(run: Path, model: str) -> dict[str, LanguageScore]:
    results = cached_results(run / unseen.EVALUATION, model)
    return {text: LanguageScore.from_json(result) for text, result in results.items()}


def _changes(base: Scores, model: Scores) -> dict[str, Estimate]:
    """Text, or mean of texts, -> change of bits per byte; documents of the same number are drawn together."""
    each = {}
    for text in (text for texts in TEXTS.values() for text in texts):
        bits = estimates({BASE: base[text], "model": model[text]}, 1)
        each[text] = bits["model"]["bits_per_byte"] / bits[BASE]["bits_per_byte"] - 1
    means = {name: mean([each[text] for text in texts]) for name, texts in TEXTS.items()}
    return means | {text: each[text] for text in TEXTS["unseen"]}


def _repeated(score: Scores, text: str) -> float:
    """Bits per token of what a document says a second time."""
    whole, start = score[text], score[f"{text}-start"]
    tokens = sum(whole.document_tokens) - sum(start.document_tokens)
    return (sum(whole.document_bits) - sum(start.document_bits)) / tokens


def _routing(score: Scores) -> dict[str, dict[str, float]]:
    """Share of tokens whose choices are all original, and weight of new experts, per group of texts, over layers."""
    found = {}
    for group in ("original", "unseen", "learned"):
        routings = [routing for text in TEXTS[group] if (routing := score[text].routing)]
        if routings:
            shares, weights = (
                fmean(fmean(getattr(routing, name)) for routing in routings)
                for name in ("all_original_share", "new_gate_weight")
            )
            found[group] = {"all_original_share": round(shares, 4), "new_gate_weight": round(weights, 4)}
    return found


def _rounded(interval: Interval) -> list[float]:
    return [round(number, DIGITS) for number in (interval.value, interval.low, interval.high)]


def unseen_picture(results: Json) -> str:
    """Learning against the loss on languages that no replay text contains."""
    found, series = results["settings"], []
    for name, members in CHART.items():
        points = {
            label: [(found[setting]["change"]["learned"][0], found[setting]["change"]["unseen"][0])]
            for label, setting in members.items()
            if setting in found
        }
        if points:
            series.append(Series(name, points, is_joined=len(points) > 1))
    return trade_off_chart(
        "Learning, and what is lost of the base",
        series,
        x_axis="expanded languages, a kind of text never trained on: bits per byte against base",
        y_axis="eight languages that no text of a setting has (base: 0)",
    )


def choices_table(short: Json, plain: Json) -> str:
    """Markdown: what someone weighs who has to choose, of both bases; over seeds the mean and the range."""
    columns = [(short, "unseen"), (plain, "read")]
    rows = []
    for label, names in CHOICES.items():
        row = [label]
        for results, kept in columns:
            found = [results["settings"][name] for name in names if name in results["settings"]]
            changes = [[one["change"][text][0] for one in found] for text in ("learned", kept)]
            row += [_over_seeds(numbers) for numbers in changes]
        rows.append(row)
    head = ["learned", "eight unseen languages"]
    head += ["learned, second base", "four unseen languages that it has read"]
    return markdown_table(Table(["change against base", *head], rows))


def _over_seeds(numbers: Sequence[float]) -> str:
    if len(numbers) < 2:
        return percent(numbers[0]) if numbers else ""
    return f"{percent(fmean(numbers))} ({percent(min(numbers))} to {percent(max(numbers))})"


def unseen_tables(results: Json, head: Mapping[str, str] = HEAD) -> str:
    """Markdown: changes, then what else shows whether the base is still there, then routing.

    Args:
        head: Text → head of its column.
    """
    rows, others, routes = [], [], []
    nothing = {"copying": results["base"]["copying"], "recall": results["base"]["recall"]}
    others.append(["base", *(f"{value:.2f}" for value in nothing.values()), "", ""])
    for setting in results["settings"].values():
        intervals = {text: Interval(*setting["change"][text]) for text in head}
        cells = [x.text(percent) if text in ENDPOINTS else percent(x.value) for text, x in intervals.items()]
        rows.append([setting["label"], *cells])
        leads = [Interval(*lead).text(percent) for lead in setting["against"].values()] or ["", ""]
        others.append([setting["label"], *(f"{number:.2f}" for number in setting["repeated"].values()), *leads])
        if setting["routing"]:
            routes.append([setting["label"], *_routes(setting["routing"])])
    label = SETTINGS[COMPARED].label
    measures = ["copying, bits per token", "recall", *(f"{HEAD[end]}, minus {label}" for end in ENDPOINTS)]
    groups = ("original", "unseen", "expanded")
    routing = [
        f"{what}, {group} languages" for what in ("all choices original", "weight of new experts") for group in groups
    ]
    tables = [Table(["change against base", *head.values()], rows), Table(["", *measures], others)]
    tables += [Table(["routing, mean over layers", *routing], routes)] if routes else []
    labels = {name: setting["label"] for name, setting in results["settings"].items()}
    parts = [*map(markdown_table, tables), wrong_language_section(results.get("wrong_language", {}), labels)]
    return "\n\n".join(filter(None, parts))


def wrong_language_section(found: Json, labels: Mapping[str, str]) -> str:
    """Markdown: how often models go on in another language, a row per language; "" if that has not been measured."""
    if not found:
        return ""
    rates = records.validate(dict[str, dict[str, WrongLanguage]], found, "wrong_language", "rerun make results")
    named = {language: {labels.get(x, x): rate for x, rate in its.items()} for language, its in rates.items()}
    table = wrong_language_table(named)
    return f"{markdown_table(table)}\n\n{table.note}"


def _routes(routing: Json) -> Sequence[str]:
    names = ("all_original_share", "new_gate_weight")
    return [
        number_text(routing[group][name], "{:.0%}") for name in names for group in ("original", "unseen", "learned")
    ]
