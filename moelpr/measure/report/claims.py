"""Claims about models and verified conversions, and whether the numbers show them."""

import math
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import field
from pathlib import Path
from typing import Annotated, Any, Literal, Required, Self, TypedDict, cast

from pydantic import Field
from pydantic.dataclasses import dataclass

from moelpr.base import records
from moelpr.base.errors import UserError
from moelpr.base.records import FOREIGN, STRICT
from moelpr.base.yaml_files import read_mapping
from moelpr.measure.report.language_results import LanguageResults
from moelpr.measure.report.numbers import percent


class Verification(TypedDict, total=False):
    """The result of `moelpr model verify --json`, with fields that are only shown.

    Attributes:
        equal: Whether the models are equal within the tolerances.
        num_tensors: The number of tensors that were compared.
        max_abs_diff: The largest difference of a tensor; null if it is infinite or NaN.
        max_abs_logit_diff: The largest difference of a logit.
        same_next_token: The fraction of tokens with the same most likely next token.
    """

    __pydantic_config__ = FOREIGN | {"extra": "allow"}  # type: ignore[misc]

    equal: Required[bool]
    num_tensors: Required[int]
    max_abs_diff: float | None
    max_abs_logit_diff: float | None
    same_next_token: float | None


def read_verifications(paths: Iterable[Path]) -> dict[str, Verification]:
    """File name without its suffix -> the last JSON line that `moelpr model verify --json` printed.

    Raises:
        UserError: A file is missing, or has no such line.
    """
    checks: dict[str, Verification] = {}
    for path in paths:
        if path.stem in checks:
            raise UserError(f"--verification {path} has the name of another one; rename it")
        remedy = "pass outputs of `moelpr model verify A B --json` as --verification"
        lines = [line for line in records.content(path, remedy).splitlines() if line.startswith(b"{")]
        checks[path.stem] = records.parse(Verification, lines[-1] if lines else b"", str(path), remedy)
    return checks


def read_facts(path: Path) -> dict[str, dict[str, str]]:
    """Title -> name -> value as text; a UserError if the file is not such a mapping."""
    content = read_mapping(path, "facts")
    if not all(isinstance(facts, dict) for facts in content.values()):
        raise UserError(f"--facts {path} must be a mapping of title to {{name: value}}; see docs/report.md")
    return {str(title): {str(name): str(value) for name, value in facts.items()} for title, facts in content.items()}


def check_result(check: Mapping[str, Any]) -> str:
    """The result of moelpr model verify in words."""
    keys = {"max_abs_diff": "tensor", "max_abs_logit_diff": "logit"}
    found = {name: check[key] for key, name in keys.items() if key in check}
    parts = [f"{name} {'Inf or NaN' if value is None else f'{value:.2g}'}" for name, value in found.items()]
    return f"largest difference of a {' and of a '.join(parts)}" if parts else "not measured"


# The value of each measure, from the changes in bits per byte of all models against the last.
MEASURES: dict[str, Callable[..., float]] = {
    "change": lambda change: change,
    "undone": lambda left, lost: 1 - left / lost if lost > 0 else math.nan,
    "lead": lambda ours, theirs: theirs - ours,
}
Text = Annotated[str, Field(min_length=1)]
Bound = Annotated[float, Field(strict=False, allow_inf_nan=False)]  # YAML reads 1e-2 as text


@dataclass(frozen=True)
class Judgment:
    """A claim about one language, or a check (language ""), and whether the numbers show it."""

    name: str
    language: str
    claim: str
    found: str
    value: float
    ok: bool


@dataclass(frozen=True, config=STRICT)
class Claim:
    """A claim about each language of a group.

    One of `change`, `undone` and `lead` names the measure, a relative change (-0.05 is 5% less), and its models; the
    last model is the reference.

    Attributes:
        name: A short name.
        claim: What is claimed, as a sentence.
        languages: The group of languages, original or expanded.
        change: The change of the first model's bits per byte against the second's.
        undone: The fraction of the second model's increase against the third that the first one undoes.
        lead: How much lower the first model's change against the third is than the second's.
        at_least: The least value that shows the claim.
        at_most: The highest value that shows the claim; either this or at_least.
    """

    name: Text
    claim: Text
    languages: Literal["expanded", "original"]
    change: tuple[str, str] | None = None
    undone: tuple[str, str, str] | None = None
    lead: tuple[str, str, str] | None = None
    at_least: Bound | None = None
    at_most: Bound | None = None

    def __post_init__(self) -> None:
        if sum(getattr(self, name) is not None for name in MEASURES) != 1:
            raise UserError(f"the claim {self.name} must have one of {', '.join(MEASURES)}")
        if (self.at_least is None) == (self.at_most is None):
            raise UserError(f"the claim {self.name} must have one of at_least, at_most")

    @property
    def measure(self) -> str:
        return next(name for name in MEASURES if getattr(self, name) is not None)

    @property
    def models(self) -> tuple[str, ...]:
        """The models that are compared, then the reference."""
        return cast(tuple[str, ...], getattr(self, self.measure))


@dataclass(frozen=True, config=STRICT)
class Claims:
    """Claims about models, from a YAML file like examples/demo-claims.yaml.

    Attributes:
        title: The report's title if every claim is shown.
        note: A paragraph for the report.
        claims: The claims.
        checks: The name of a verification -> what it compares.
    """

    title: str | None = None
    note: str | None = None
    claims: list[Claim] = field(default_factory=list)
    checks: dict[str, str] = field(default_factory=dict)

    @classmethod
    def read(cls, path: Path) -> Self:
        """Read a file of --claims; a UserError if a claim is incomplete, or a field does not exist."""
        content = read_mapping(path, "claims")
        return records.validate(cls, content, str(path), "pass --claims a file like examples/demo-claims.yaml")

    def judge(self, results: LanguageResults, checks: Mapping[str, Verification]) -> list[Judgment]:
        """Judge every claim for every language of its group, then every check. What was not measured is not shown.

        Raises:
            UserError: A claim is about a model or a group of languages without results.
        """
        judgments = [judgment for claim in self.claims for judgment in _judge(claim, results)]
        for name, meaning in self.checks.items():
            check: Mapping[str, Any] = checks.get(name) or {}
            judgments.append(Judgment(name, "", meaning, check_result(check), math.nan, check.get("equal", False)))
        return judgments


def _judge(claim: Claim, results: LanguageResults) -> Iterator[Judgment]:
    *models, reference = claim.models
    languages = results.languages(claim.languages)
    if not languages:
        raise UserError(
            f"the claim {claim.name} needs results of {claim.languages} languages; pass --evaluation with a file of "
            "`moelpr evaluate --original-languages ...`"
        )
    if unknown := [model for model in claim.models if model not in results.models]:
        raise UserError(
            f"the claim {claim.name} is about {', '.join(unknown)}, which is not in --evaluation; choose from "
            f"{', '.join(results.models)}"
        )
    for language in languages:
        changes = [results.change(model, language, reference).value for model in models]
        value = MEASURES[claim.measure](*changes)
        found = ", ".join(f"{model} {percent(change)}" for model, change in zip(models, changes, strict=True))
        ok = value <= claim.at_most if claim.at_most is not None else value >= cast(float, claim.at_least)
        yield Judgment(claim.name, language, claim.claim, f"{found} against {reference}", value, bool(ok))
