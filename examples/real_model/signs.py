"""What the paper would predict and how good the result should be, each compared with the numbers of the page."""

from collections.abc import Mapping
from dataclasses import dataclass
from enum import StrEnum
from statistics import fmean
from typing import Any

from examples.languages import ORIGINAL
from examples.real_model.settings import MORE_TEXT, REPLAY, SETTINGS
from moelpr.report.numbers import percent

Json = Mapping[str, Any]
COMPARABLE = 0.8  # fraction of full fine-tuning's learning that counts as comparable
FAR_LESS = 0.2  # fraction of another's forgetting that counts as far less
VISIBLE = 0.02  # rise of bits per byte that counts as visible forgetting
MARGIN = 0.005  # the least that `margin` is


class Verdict(StrEnum):
    """Of a sign; its value is what the page says."""

    SEEN = "seen"
    NOT_SEEN = "**not seen**"
    CLOSE = "too close to tell"
    MISSING = "not measured yet"  # a setting that it needs is not done


@dataclass(frozen=True)
class Sign:
    """A prediction; `numbers` are what was found."""

    text: str
    verdict: Verdict
    numbers: str


def change(results: Json, setting: str, part: str, group: str) -> float | None:
    """Mean change of bits per byte against base over kinds, languages and seeds; None if the setting is not done."""
    found = results["settings"].get(setting)
    return found and fmean(model["means"][part][group][0] for model in found["models"].values())


def margin(results: Json) -> float:
    """What seeds change, in a fraction of base: two settings that differ by less may have changed places by chance."""
    spreads = [MARGIN]
    for setting in results["settings"].values():
        for group in ("original", "expanded"):
            values = [model["means"]["out"][group][0] for model in setting["models"].values()]
            spreads.append(max(values) - min(values))
    return max(spreads)


def signs(results: Json) -> list[Sign]:
    """What the paper predicts, then the bars of this project."""
    return [*_of_the_paper(results), *_how_good(results)]


def _of_the_paper(results: Json) -> list[Sign]:
    found = []
    for stage1, stage2, label in (
        ("copies-stage1", "copies", "K copies"), ("one-copy-stage1", "one-copy", "1 copy"),
    ):  # fmt: skip
        text = f"review improves the original languages over stage 1 ({label}), kinds never trained on"
        found.append(_less(results, text, stage2, stage1, "out", "original"))
    text = "the LPR loss keeps the original languages better than review without it (1 copy), kinds never trained on"
    found.append(_less(results, text, "one-copy", "no-lpr", "out", "original"))
    for group in ("expanded", "original"):
        text = f"copied new experts are better than random ones (1 copy): {group} languages, kinds never trained on"
        found.append(_less(results, text, "one-copy", "random", "out", group))
    text = "MoE-LPR keeps the original languages better than plain MoE (1 copy), kinds never trained on"
    found.append(_less(results, text, "one-copy", "plain", "out", "original"))
    if REPLAY in results["settings"]:
        text = "MoE-LPR keeps the original languages better than full fine-tuning on the text of both stages"
        found.append(_less(results, f"{text}, kinds never trained on", "copies", REPLAY, "out", "original"))
    values = [change(results, name, "in", "expanded") for name in ("copies", "full")]
    text = f"MoE-LPR learns comparably to full fine-tuning: at least {COMPARABLE:.0%} of its gain, trained kinds"
    is_seen = None if None in values else values[1] < 0 and values[0] <= COMPARABLE * values[1]
    return [*found, Sign(text, _verdict(is_seen), _numbers(["MoE-LPR, K copies", "full fine-tuning"], values))]


def _how_good(results: Json) -> list[Sign]:
    found = []
    for part, where, bar in (("in", "trained kinds", -0.35), ("out", "kinds never trained on", -0.15)):
        for name in ("copies", *(x for x in MORE_TEXT if x in results["settings"])):
            value = change(results, name, part, "expanded")
            text = f"expanded languages at least {-bar:.0%} better than base, {where}"
            is_seen = None if value is None else value <= bar
            found.append(Sign(text, _verdict(is_seen), _numbers([SETTINGS[name].label], [value])))
    done = results["settings"].get("copies")
    text = "each original language within 1% of base, or better, on every kind never trained on"
    if done is None:
        found.append(Sign(text, Verdict.MISSING, _numbers(["MoE-LPR, K copies"], [None])))
    else:
        by_text = {
            name: fmean(model["change"][name][0] for model in done["models"].values())
            for name in next(iter(done["models"].values()))["change"]
            if name.split(".")[0] in ORIGINAL and name.split(".")[1] in results["kinds"]["out"]
        }
        worst = max(by_text, key=lambda name: by_text[name])
        numbers = f"worst: {worst.split('.')[0]} {percent(by_text[worst])}"
        found.append(Sign(text, _verdict(by_text[worst] <= 0.01), numbers))
    kept = change(results, "copies", "out", "original")
    for name, label in (("full", "full fine-tuning"), ("lora", "LoRA")):
        value = change(results, name, "out", "original")
        text = f"{label}, at the learning rate that serves the expanded languages best, forgets visibly (at least "
        text += f"{VISIBLE:.0%} on kinds never trained on)"
        is_seen = None if value is None else value >= VISIBLE
        found.append(Sign(text, _verdict(is_seen), _numbers([label], [value])))
        text = f"MoE-LPR forgets at most a fifth of what {label} does, kinds never trained on"
        is_seen = None if value is None or kept is None else value > 0 and kept <= FAR_LESS * value
        found.append(Sign(text, _verdict(is_seen), _numbers(["MoE-LPR, K copies", label], [kept, value])))
    return found


def _less(results: Json, text: str, better: str, worse: str, part: str, group: str) -> Sign:
    """A sign that is seen if one setting's bits per byte are lower than another's by more than seeds change."""
    values = [change(results, name, part, group) for name in (better, worse)]
    if None in values:
        verdict = Verdict.MISSING
    elif abs(values[1] - values[0]) < margin(results):
        verdict = Verdict.CLOSE
    else:
        verdict = _verdict(values[0] < values[1])
    return Sign(text, verdict, _numbers([SETTINGS[name].label for name in (better, worse)], values))


def _verdict(is_seen: bool | None) -> Verdict:
    return Verdict.MISSING if is_seen is None else Verdict.SEEN if is_seen else Verdict.NOT_SEEN


def _numbers(labels: list[str], values: list[float | None]) -> str:
    pairs = zip(labels, values, strict=True)
    return "; ".join(f"{label} {'not done' if value is None else percent(value)}" for label, value in pairs)
