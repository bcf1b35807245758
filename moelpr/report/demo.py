"""A run's report: the numbers (`report.json`), what they show of what was promised, and the page (`report.html`).

The promises are judged here, from the numbers alone; the page only prints the verdicts.
"""

import json
import math
from collections.abc import Mapping
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import Any

from moelpr.errors import UserError
from moelpr.files import atomic_file
from moelpr.languages import language_name

MODELS = ("base", "full_finetune", "stage1", "stage2")
STAGES = ("stage1", "stage2")

# The promised effect. Shares of the reference's bits per byte.
LEARNED_SHARE = 0.05  # stage 1 makes an expanded language at least this much cheaper than base
KEPT_SHARE = 0.02  # stage 2 may cost this much more than what it must keep
REPAIRED_SHARE = 0.5  # stage 2 undoes at least this much of what stage 1 made original languages dearer
FAR_BETTER_SHARE = 0.10  # full fine-tuning makes an original language at least this much dearer than stage 2 does

# What each check may reach at most.
CHECK_LIMITS = {
    "upcycle_max_abs_logit_diff": 1e-4,
    "frozen_max_abs_diff": 0.0,
    "export_max_abs_logit_diff": 1e-4,
}


@dataclass(frozen=True)
class Continuation:
    """What each model makes of the first words of a held-out document."""

    prompt: str
    reference: str  # how the document itself goes on
    by_model: dict[str, str]


@dataclass(frozen=True)
class Report:
    """Everything a report says. Missing models and numbers are left out; the page then says so."""

    languages: dict[str, str]  # language -> "original" | "expanded"
    bits_per_byte: dict[str, dict[str, float]]  # model (see MODELS) -> language -> value
    original_expert_share: dict[str, dict[str, dict[str, Any]]]  # stage -> language -> {"overall", "per_layer"}
    checks: dict[str, float]  # see CHECK_LIMITS
    token_counts: dict[str, int] = field(default_factory=dict)  # run -> tokens it was trained on
    wall_times_s: dict[str, float] = field(default_factory=dict)  # step -> seconds
    versions: dict[str, str] = field(default_factory=dict)
    settings: dict[str, Any] = field(default_factory=dict)  # what else says how it was made: name -> value
    continuations: dict[str, Continuation] = field(default_factory=dict)  # language -> texts
    metrics: dict[str, str] = field(default_factory=dict)  # model -> its metrics.jsonl, relative to the run's folder
    title: str = "MoE-LPR: four models on the same held-out text"

    def group(self, name: str) -> list[str]:
        """Languages that are "original" or "expanded"."""
        return [language for language, group in self.languages.items() if group == name]

    def bits(self, model: str, language: str) -> float:
        """Bits per byte, NaN where it was not measured."""
        return self.bits_per_byte.get(model, {}).get(language, math.nan)

    def mean_bits(self, model: str, group: str) -> float:
        """Mean bits per byte over the languages of a group, NaN where one is missing."""
        values = [self.bits(model, language) for language in self.group(group)]
        return sum(values) / len(values) if values else math.nan

    def to_json(self) -> dict[str, Any]:
        content = asdict(self)
        content["routing"] = {"original_expert_share": content.pop("original_expert_share")}
        content["effect"] = [asdict(line) for line in effect_lines(self)]
        return _finite_or_null(content)

    @classmethod
    def from_json(cls, content: Mapping[str, Any]) -> "Report":
        """The report that `to_json` wrote; its effect is judged anew."""
        content = dict(content)
        content.pop("effect", None)
        content["original_expert_share"] = content.pop("routing", {}).get("original_expert_share", {})
        report = cls(**content)
        return replace(
            report,
            checks={name: math.nan if value is None else value for name, value in report.checks.items()},
            bits_per_byte={
                model: {language: math.nan if bits is None else bits for language, bits in languages.items()}
                for model, languages in report.bits_per_byte.items()
            },
            continuations={language: Continuation(**texts) for language, texts in content["continuations"].items()},
        )


@dataclass(frozen=True)
class EffectLine:
    """One promise for one language, and whether the numbers keep it."""

    name: str  # see PROMISES
    language: str
    wanted: str
    found: str
    ok: bool


PROMISES = {
    "learned": "Learned in stage 1",
    "kept_by_review": "Still there after stage 2",
    "preserved": "Original languages kept",
    "repaired": "Review repaired stage 1's forgetting",
    "better_than_full_finetune": "Far better than full fine-tuning",
}


def effect_lines(report: Report) -> list[EffectLine]:
    """Every promise for every language it is made for. A number that is missing or not finite keeps no promise."""
    lines = []
    for language in report.group("expanded"):
        base, stage1, stage2 = (report.bits(model, language) for model in ("base", "stage1", "stage2"))
        learned, lost = _change(stage1, base), _change(stage2, stage1)
        lines += [
            EffectLine(
                "learned",
                language,
                f"after stage 1 at least {LEARNED_SHARE:.0%} fewer bits per byte than base",
                f"{percent(learned)} against base",
                learned <= -LEARNED_SHARE,
            ),
            EffectLine(
                "kept_by_review",
                language,
                f"after stage 2 at most {KEPT_SHARE:.0%} more bits per byte than after stage 1",
                f"{percent(lost)} against stage 1",
                lost <= KEPT_SHARE,
            ),
        ]
    for language in report.group("original"):
        base = report.bits("base", language)
        full, stage1, stage2 = (
            _change(report.bits(model, language), base) for model in ("full_finetune", "stage1", "stage2")
        )
        lines += [
            EffectLine(
                "preserved",
                language,
                f"after stage 2 at most {KEPT_SHARE:.0%} more bits per byte than base",
                f"{percent(stage2)} against base",
                stage2 <= KEPT_SHARE,
            ),
            EffectLine(
                "repaired",
                language,
                f"stage 2 undoes at least {REPAIRED_SHARE:.0%} of what stage 1 lost against base",
                f"{percent(stage2)} against base, {percent(stage1)} after stage 1",
                stage1 > 0 and stage2 <= (1 - REPAIRED_SHARE) * stage1,
            ),
            EffectLine(
                "better_than_full_finetune",
                language,
                f"full fine-tuning costs at least {100 * FAR_BETTER_SHARE:.0f} points more against base than stage 2",
                f"{percent(full)} after full fine-tuning, {percent(stage2)} after stage 2",
                full - stage2 >= FAR_BETTER_SHARE,
            ),
        ]
    return lines


def check_ok(name: str, value: float) -> bool:
    """Whether a check is within its limit; NaN and checks without a limit are not."""
    return value <= CHECK_LIMITS.get(name, -math.inf)


def failures(report: Report) -> list[str]:
    """What the run does not show of what was promised: a sentence each, none if it shows everything."""
    missed = [
        f"{language_name(line.language)}: {line.found}; wanted: {line.wanted}"
        for line in effect_lines(report)
        if not line.ok
    ]
    for name, limit in CHECK_LIMITS.items():
        if name not in report.checks:
            missed.append(f"{name} was not measured")
        elif not check_ok(name, report.checks[name]):
            missed.append(f"{name} is {report.checks[name]:.3g}; wanted: at most {limit:g}")
    return missed


def write_report(run_dir: Path, report: Report) -> Path:
    """Write report.json, report.html and report.md into `run_dir`, replacing what is there. Returns the page's path."""
    with atomic_file(run_dir / "report.json") as temporary:
        content = json.dumps(report.to_json(), indent=2, ensure_ascii=False, allow_nan=False)
        temporary.write_text(content + "\n", encoding="utf-8")
    return write_pages(run_dir, report)


def write_pages(run_dir: Path, report: Report) -> Path:
    """Write report.html and report.md alone, with the loss curves as they stand now in the runs' metrics.jsonl."""
    from moelpr.report.demo_document import demo_document
    from moelpr.report.write import write_document
    from moelpr.run_metrics import read_metrics

    metrics = {
        model: read_metrics(run_dir / path) for model, path in report.metrics.items() if (run_dir / path).exists()
    }
    return write_document(run_dir, demo_document(report, metrics))


def read_report(run_dir: Path) -> Report:
    """The report in `run_dir`. Raises UserError where there is none or it is not one."""
    path = run_dir / "report.json"
    try:
        return Report.from_json(json.loads(path.read_text(encoding="utf-8")))
    except OSError as error:
        raise UserError(
            f"{path} cannot be read ({error.strerror}); give the folder of a run that has a report"
        ) from error
    except (ValueError, TypeError, KeyError, AttributeError) as error:
        raise UserError(
            f"{path} is no report of this version ({error}); run the demo again to write a new one"
        ) from error


def _change(value: float, reference: float) -> float:
    """Relative change; NaN, which keeps no promise, where either is missing."""
    return value / reference - 1 if reference else math.nan


def percent(change: float) -> str:
    """A relative change with its sign: "−6.2%", "+0.9%", "not measured"."""
    if not math.isfinite(change):
        return "not measured"
    return f"{100 * change:+.1f}%".replace("-", "\u2212")


def _finite_or_null(value: Any) -> Any:
    """JSON has no NaN and no infinity."""
    if isinstance(value, dict):
        return {key: _finite_or_null(item) for key, item in value.items()}
    if isinstance(value, list | tuple):
        return [_finite_or_null(item) for item in value]
    if isinstance(value, float) and not math.isfinite(value):
        return None
    return value
