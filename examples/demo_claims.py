"""Claims of the demo about its models, fixed in advance, and whether the numbers of its report show them."""

import json
import math
from collections.abc import Callable, Iterator
from inspect import signature
from pathlib import Path
from typing import Any, NamedTuple

from moelpr.measure.report.numbers import percent


class Claim(NamedTuple):
    """A claim about each language of a group, by relative changes in bits per byte against base."""

    name: str
    languages: str
    text: str
    is_shown: Callable[..., bool]  # its arguments are named like the models


class Judgment(NamedTuple):
    """A claim about one language, or a check (language ""), and whether the numbers show it."""

    name: str
    language: str
    claim: str
    found: str
    ok: bool


CLAIMS = (
    Claim(
        "learned", "expanded", "after stage 1 at least 5% fewer bits per byte than base", lambda stage1: stage1 <= -0.05
    ),
    Claim(
        "kept_by_review",
        "expanded",
        "after stage 2 at least 4.5% fewer bits per byte than base",
        lambda stage2: stage2 <= -0.045,
    ),
    Claim(
        "preserved", "original", "after stage 2 at most 1% more bits per byte than base", lambda stage2: stage2 <= 0.01
    ),
    Claim(
        "repaired",
        "original",
        "stage 2 undoes at least 90% of what stage 1 lost against base",
        lambda stage2, stage1: stage1 > 0 and 1 - stage2 / stage1 >= 0.9,
    ),
    Claim(
        "better_than_full_finetune",
        "original",
        "full fine-tuning costs at least 10 percentage points more against base than stage 2",
        lambda stage2, full_finetune: full_finetune - stage2 >= 0.1,
    ),
)
CHECKS = {
    "check-upcycled": "The upcycled model before training against its dense base",
    "check-frozen": "Every frozen tensor after stage 2 against the base",
    "check-export": "The Megatron checkpoint of stage 2 against its export in stock transformers",
}


def read_checks(run: Path) -> dict[str, Any]:
    """The last JSON line in the log of each check, which is that of `moelpr model verify --json`."""
    logs = {name: path.read_text("utf-8") for name in CHECKS if (path := run / "logs" / f"{name}.log").is_file()}
    lines = {name: [line for line in log.splitlines() if line.startswith("{")] for name, log in logs.items()}
    return {name: json.loads(found[-1]) for name, found in lines.items() if found}


def judge(report: dict[str, Any], checks: dict[str, Any]) -> Iterator[Judgment]:
    """Judge every claim for every language of its group by report.json, then every check.

    What was not measured is not shown.
    """
    for claim in CLAIMS:
        models = [*signature(claim.is_shown).parameters]
        for language in (name for name, group in report["languages"].items() if group == claim.languages):
            measured = [report["change"].get(model, {}).get(language, {}).get("value") for model in models]
            changes = [math.nan if value is None else value for value in measured]
            figures = ", ".join(f"{model} {percent(change)}" for model, change in zip(models, changes, strict=True))
            yield Judgment(claim.name, language, claim.text, f"{figures} against base", claim.is_shown(*changes))
    for name, meaning in CHECKS.items():
        check = checks.get(name, {})
        keys = {"max_abs_diff": "tensor", "max_abs_logit_diff": "logit"}
        values = {what: check[key] for key, what in keys.items() if key in check}
        parts = [f"{what} {'Inf or NaN' if value is None else f'{value:.2g}'}" for what, value in values.items()]
        found = f"largest difference of a {' and of a '.join(parts)}" if parts else "not measured"
        yield Judgment(name, "", meaning, found, check.get("equal", False))
