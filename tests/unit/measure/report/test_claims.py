"""Claims are judged by the numbers, and a file that is not one of claims or verifications is rejected clearly."""

import math
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from moelpr.base.errors import UserError
from moelpr.measure.report.claims import Claims, read_facts, read_verifications
from moelpr.measure.report.language_results import LanguageResults
from moelpr.measure.report.numbers import Interval

DEMO_CLAIMS = Path(__file__).parents[4] / "examples/demo-claims.yaml"
CHECKS = {name: {"equal": True} for name in ("check-upcycled", "check-frozen", "check-export")}


@pytest.fixture
def results() -> LanguageResults:
    """Every claim of the demo is shown, by hand-picked numbers against a base of 2 bits per byte everywhere."""
    bits = {
        "base": {"en": 2.0, "zh": 2.0, "el": 2.0},
        "full_finetune": {"en": 3.0, "zh": 2.8, "el": 1.6},
        "stage1": {"en": 2.4, "zh": 2.4, "el": 1.8},
        "stage2": {"en": 2.01, "zh": 1.98, "el": 1.82},
    }
    groups = {"en": "original", "zh": "original", "el": "expanded"}
    return LanguageResults(groups, {m: {name: Interval(v) for name, v in values.items()} for m, values in bits.items()})


def missed(results: LanguageResults) -> set[tuple[str, str]]:
    judgments = Claims.read(DEMO_CLAIMS).judge(results, CHECKS)
    assert len(judgments) == 1 * 2 + 2 * 3 + 3
    return {(judgment.name, judgment.language) for judgment in judgments if not judgment.ok}


@pytest.mark.parametrize(
    ("model", "language", "bits", "broken"),
    [
        ("stage1", "el", 1.91, "learned"),  # 4.5% fewer than 2.0; 5% are claimed
        ("stage2", "el", 1.92, "kept_by_review"),  # 4% fewer than 2.0; 4.5% are claimed
        ("stage2", "zh", 2.03, "preserved"),  # 1.5% more than 2.0, yet 90% of stage 1's +20% are undone
        ("stage1", "en", 2.05, "repaired"),  # stage 2's +0.5% is a fifth of +2.5%
        ("stage1", "en", 1.99, "repaired"),  # nothing was lost, so nothing could be undone
        ("full_finetune", "en", 2.2, "better_than_full_finetune"),  # +10% against +0.5% is 9.5 points
    ],
)
def test_each_claim_fails_alone_if_its_number_misses(results, model, language, bits, broken) -> None:
    assert missed(results) == set()
    results.bits[model][language] = Interval(bits)
    assert missed(results) == {(broken, language)}


@pytest.mark.parametrize(
    ("model", "language", "bits"),
    [("stage1", "el", 1.8999), ("stage2", "el", 1.9099), ("stage2", "zh", 2.0199), ("full_finetune", "en", 2.2101)],
)
def test_number_just_within_its_limit_is_shown(results, model, language, bits) -> None:
    results.bits[model][language] = Interval(bits)
    assert missed(results) == set()


@pytest.mark.parametrize("spoil", [lambda en: en.update(en=Interval(math.nan)), lambda en: en.pop("en")])
def test_claim_about_a_missing_number_is_not_shown(results: LanguageResults, spoil: Callable[[dict], Any]) -> None:
    spoil(results.bits["stage2"])
    assert missed(results) == {(name, "en") for name in ("preserved", "repaired", "better_than_full_finetune")}


def test_claim_about_an_unknown_model_names_the_known_ones(results: LanguageResults) -> None:
    del results.bits["stage2"]
    with pytest.raises(UserError, match=r"kept_by_review .*stage2.*base, full_finetune, stage1"):
        missed(results)


def test_claims_need_results_of_their_languages(results: LanguageResults) -> None:
    results.groups = dict.fromkeys(results.groups, "")  # the evaluation did not name the original languages
    for without in (results, LanguageResults()):
        with pytest.raises(UserError, match="learned .*expanded.*--evaluation"):
            missed(without)


def test_judgment_says_what_was_found(results: LanguageResults) -> None:
    checks = {"check-export": {"equal": False, "max_abs_diff": 0.5}}
    (learned, *_, check) = Claims.read(DEMO_CLAIMS).judge(results, checks)
    assert learned.found == "stage1 \u221210.0% against base" and learned.value == pytest.approx(-0.1)
    assert (check.name, check.ok, check.found) == ("check-export", False, "largest difference of a tensor 0.5")


@pytest.mark.parametrize(
    ("claim", "wrong"),
    [
        ("change: [x, y]", "one of at_least, at_most"),
        ("change: [x], at_most: 0", "change"),
        ("change: [x, y], lead: [x, y, z], at_most: 0", "one of change, undone, lead"),
    ],
)
def test_incomplete_claims_are_rejected(tmp_path: Path, claim: str, wrong: str) -> None:
    path = tmp_path / "claims.yaml"
    path.write_text(f"claims: [{{name: a, claim: b, languages: expanded, {claim}}}]")
    with pytest.raises(UserError, match=rf"claims\.yaml: .*{wrong}.*--claims a file like examples/demo-claims\.yaml"):
        Claims.read(path)


def test_verification_is_the_last_json_line_of_a_log(tmp_path: Path) -> None:
    path = tmp_path / "check-export.log"
    path.write_text('a warning\n{"equal": true, "num_tensors": 7, "max_abs_diff": null}\n')
    assert read_verifications([path]) == {"check-export": {"equal": True, "num_tensors": 7, "max_abs_diff": None}}
    for content in ("text", '{"other": 1}', '{"equal'):
        path.write_text(content)
        with pytest.raises(UserError, match=r"check-export\.log: .*moelpr model verify A B --json"):
            read_verifications([path])
    with pytest.raises(UserError, match="nowhere"):
        read_verifications([tmp_path / "nowhere"])


def test_verifications_of_one_name_are_rejected(tmp_path: Path) -> None:
    paths = [tmp_path / folder / "check.log" for folder in ("one", "two")]
    for path in paths:
        path.parent.mkdir()
        path.write_text('{"equal": true, "num_tensors": 7}')
    with pytest.raises(UserError, match=r"two/check\.log has the name of another one"):
        read_verifications(paths)


def test_numbers_and_dates_as_yaml_reads_them(tmp_path: Path, results: LanguageResults) -> None:
    """YAML reads 1e-2 as text and 2026-11-27 as a date."""
    claims, facts = tmp_path / "claims.yaml", tmp_path / "facts.yaml"
    claims.write_text("claims: [{name: kept, claim: c, languages: original, change: [stage2, base], at_most: 1e-2}]\n")
    assert [judgment.ok for judgment in Claims.read(claims).judge(results, {})] == [True, True]
    claims.write_text("checks: [a]\n")
    with pytest.raises(UserError, match="claims.yaml: checks .*--claims"):
        Claims.read(claims)
    facts.write_text("Run: {date: 2026-11-27, 0: H100}\n")
    assert read_facts(facts) == {"Run": {"date": "2026-11-27", "0": "H100"}}
    facts.write_text("GPU: H100\n")
    with pytest.raises(UserError, match="--facts .*facts.yaml must be a mapping of title to"):
        read_facts(facts)
