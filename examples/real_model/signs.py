"""Whether the numbers of the page show what the paper would predict and how good the result should be (claims.yaml)."""

import math
from collections.abc import Mapping
from dataclasses import dataclass
from enum import StrEnum
from pathlib import Path
from statistics import fmean
from typing import Any

from pydantic import dataclasses as typed

from examples.languages import ORIGINAL
from examples.real_model.settings import MORE_TEXT, REPLAY, SETTINGS
from moelpr.base import records
from moelpr.base.yaml_files import read_mapping
from moelpr.measure.report.claims import MEASURES
from moelpr.measure.report.numbers import percent

Json = Mapping[str, Any]
CLAIMS = Path(__file__).with_name("claims.yaml")
MARGIN = 0.005  # the least that `margin` is
LABELS = {name: setting.label for name, setting in SETTINGS.items()} | {"lora": "LoRA"}


class Verdict(StrEnum):
    """Whether a claim is seen, in the words of the page."""

    SEEN = "seen"
    NOT_SEEN = "**not seen**"
    CLOSE = "too close to tell"
    MISSING = "not measured yet"  # a setting that it needs is not done


@dataclass(frozen=True)
class Sign:
    """A claim that was judged; `numbers` are what was found."""

    text: str
    verdict: Verdict
    numbers: str


@typed.dataclass(frozen=True, config=records.STRICT)
class Claim:
    """An entry of claims.yaml, which explains the measures.

    Attributes:
        claim: The claim in words.
        measure: What is computed from the changes of the settings.
        settings: Names of settings.
        kinds: Kinds of text: "in", those that are trained on, or "out", the others.
        languages: Group of languages.
        at_least: Lower bound of the measure.
        at_most: Upper bound, instead of `at_least`.
    """

    claim: str
    measure: str
    settings: list[str]
    kinds: str = "out"
    languages: str = "original"
    at_least: float | None = None
    at_most: float | None = None

    def judge(self, results: Json) -> Sign:
        changes = {name: change(results, name, self.kinds, self.languages) for name in self.settings}
        numbers = "; ".join(f"{LABELS[x]} {'not done' if v is None else percent(v)}" for x, v in changes.items())
        values = [value for value in changes.values() if value is not None]
        if len(values) < len(changes):
            return Sign(self.claim, Verdict.MISSING, numbers)
        if self.measure == "worst":
            language, value = worst_text(results, self.settings[0])
            numbers = f"worst: {language} {percent(value)}"
        elif self.measure == "gain":
            value = values[0] / values[1] if values[1] < 0 else math.nan
        else:
            value = MEASURES[self.measure](*values)
        is_lead = self.at_least is None and self.at_most is None
        if is_lead and abs(value) < margin(results):
            return Sign(self.claim, Verdict.CLOSE, numbers)
        is_seen = value >= (self.at_least or 0) if self.at_most is None else value <= self.at_most
        return Sign(self.claim, Verdict.SEEN if is_seen else Verdict.NOT_SEEN, numbers)


def signs(results: Json) -> list[Sign]:
    """All claims about settings that are part of the comparison, judged."""
    content, remedy = read_mapping(CLAIMS, "claims"), "restore it (git checkout)"
    claims = records.validate(dict[str, list[Claim]], content, str(CLAIMS), remedy)["claims"]
    extra = {REPLAY, *MORE_TEXT} - results["settings"].keys()
    return [claim.judge(results) for claim in claims if not extra & {*claim.settings}]


def change(results: Json, setting: str, kinds: str, group: str) -> float | None:
    """Mean change of bits per byte against base over kinds, languages and seeds; None if the setting is not done."""
    found = results["settings"].get(setting)
    return found and fmean(model["means"][kinds][group][0] for model in found["models"].values())


def worst_text(results: Json, setting: str) -> tuple[str, float]:
    """The original language with the largest change on a kind of text that was never trained on, and that change."""
    models = results["settings"][setting]["models"].values()
    texts = [f"{language}.{kind}" for language in ORIGINAL for kind in results["kinds"]["out"]]
    by_text = {text: fmean(model["change"][text][0] for model in models) for text in texts}
    worst = max(by_text, key=lambda text: by_text[text])
    return worst.split(".")[0], by_text[worst]


def margin(results: Json) -> float:
    """What seeds change, in a fraction of base: two settings that differ by less may have changed places by chance."""
    spreads = [MARGIN]
    for setting in results["settings"].values():
        for group in ("original", "expanded"):
            values = [model["means"]["out"][group][0] for model in setting["models"].values()]
            spreads.append(max(values) - min(values))
    return max(spreads)
