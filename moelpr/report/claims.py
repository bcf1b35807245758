"""Claims about models and verified conversions, and whether the numbers show them."""

import math
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from moelpr.process.errors import UserError
from moelpr.report.language_results import GROUPS, LanguageResults, named_input
from moelpr.report.numbers import percent
from moelpr.store.files import parse_json
from moelpr.store.yaml_files import read_mapping


def read_verifications(paths: Iterable[Path]) -> dict[str, dict[str, Any]]:
    """File name without its suffix -> the last JSON line that `checkpoint_convert/verify.py --json` printed."""
    checks = {}
    for path in paths:
        if path.stem in checks:
            raise UserError(f"--verification {path} has the name of another one; rename it")
        with named_input("--verification", path, "the output of `checkpoint_convert/verify.py A B --json`"):
            lines = [line for line in path.read_text(encoding="utf-8").splitlines() if line.startswith("{")]
            check = parse_json(lines[-1])
            names = ("same_next_token", "max_abs_diff", "max_abs_logit_diff")
            check |= {name: float(check[name]) for name in names if check.get(name) is not None}
            if type(check["equal"]) is not bool:
                raise TypeError("equal must be true or false")
            checks[path.stem] = {**check, "num_tensors": int(check["num_tensors"])}
    return checks


def read_facts(path: Path) -> dict[str, dict[str, str]]:
    """Title -> name -> value as text. Raises UserError for a file of something else."""
    content = read_mapping(path, "facts")
    with named_input("--facts", path, "a mapping of title to {name: value}"):
        return {
            str(title): {str(name): str(value) for name, value in facts.items()} for title, facts in content.items()
        }


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
        with named_input("--claims", path, expected):
            claims = cls(**content)
            for claim in claims.claims:
                (measure,) = _MEASURES.keys() & claim.keys()
                (bound,) = {"at_least", "at_most"} & claim.keys()
                is_complete = claim["claim"] and claim["name"] and claim["languages"] in GROUPS
                has_models = is_complete and len(claim[measure]) == _MEASURES[measure][0]
                if not has_models or not float(claim[bound]) < math.inf or not isinstance(claim["name"], str):
                    raise ValueError(claim["name"])
            if not isinstance(claims.checks, dict):
                raise TypeError("checks must map the name of a verification to what it compares")
            texts = [claims.title, claims.note, *claims.checks.values(), *(claim["claim"] for claim in claims.claims)]
            if not all(text is None or isinstance(text, str) for text in texts):
                raise TypeError("titles, notes, claims and what checks compare must be text")
            return cls(**content | {"claims": [_with_numbers(claim) for claim in claims.claims]})

    def judge(self, results: LanguageResults, checks: Mapping[str, Mapping[str, Any]]) -> list[Judgment]:
        """Every claim for every language of its group, then every check. What was not measured is not shown.

        Raises UserError if a claim is about a model or a group of languages without results.
        """
        judgments = [judgment for claim in self.claims for judgment in _judge(claim, results)]
        for name, meaning in self.checks.items():
            check = checks.get(name, {})
            judgments.append(Judgment(name, "", meaning, check_result(check), math.nan, check.get("equal", False)))
        return judgments


def _with_numbers(claim: Mapping[str, Any]) -> dict[str, Any]:
    """YAML reads 1e-2 as text."""
    return {name: float(value) if name in ("at_least", "at_most") else value for name, value in claim.items()}


def _judge(claim: Mapping[str, Any], results: LanguageResults) -> Iterator[Judgment]:
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
