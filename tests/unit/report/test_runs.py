"""Inputs of a report are read completely, claims are judged by the numbers, and other files are rejected clearly."""

import json
import math
import os
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from moelpr.errors import UserError
from moelpr.report.plots import Interval
from moelpr.report.runs import (
    ENDS,
    Claims,
    Results,
    curve_of,
    held_out_results,
    read_evaluations,
    read_run,
    read_verifications,
)
from tests.run_folders import make_run

DEMO_CLAIMS = Path(__file__).parents[3] / "examples/demo-claims.yaml"
CHECKS = {name: {"equal": True} for name in ("check-upcycled", "check-frozen", "check-export")}


@pytest.fixture
def results() -> Results:
    """Every claim of the demo is shown, by hand-picked numbers against a base of 2 bits per byte everywhere."""
    bits = {
        "base": {"en": 2.0, "zh": 2.0, "el": 2.0},
        "full_finetune": {"en": 3.0, "zh": 2.8, "el": 1.6},
        "stage1": {"en": 2.4, "zh": 2.4, "el": 1.8},
        "stage2": {"en": 2.01, "zh": 1.98, "el": 1.82},
    }
    groups = {"en": "original", "zh": "original", "el": "expanded"}
    return Results(groups, {m: {name: Interval(v) for name, v in values.items()} for m, values in bits.items()})


def missed(results: Results) -> set[tuple[str, str]]:
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
def test_each_claim_fails_alone_if_its_number_misses(
    results: Results, model: str, language: str, bits: float, broken: str
) -> None:
    assert missed(results) == set()
    results.bits[model][language] = Interval(bits)
    assert missed(results) == {(broken, language)}


@pytest.mark.parametrize(
    ("model", "language", "bits"),
    [("stage1", "el", 1.8999), ("stage2", "el", 1.9099), ("stage2", "zh", 2.0199), ("full_finetune", "en", 2.2101)],
)
def test_number_just_within_its_limit_is_shown(results: Results, model: str, language: str, bits: float) -> None:
    results.bits[model][language] = Interval(bits)
    assert missed(results) == set()


@pytest.mark.parametrize("spoil", [lambda en: en.update(en=Interval(math.nan)), lambda en: en.pop("en")])
def test_claim_about_a_missing_number_is_not_shown(results: Results, spoil: Callable[[dict], Any]) -> None:
    spoil(results.bits["stage2"])
    assert missed(results) == {(name, "en") for name in ("preserved", "repaired", "better_than_full_finetune")}


def test_claim_about_an_unknown_model_names_the_known_ones(results: Results) -> None:
    del results.bits["stage2"]
    with pytest.raises(UserError, match=r"kept_by_review .*stage2.*base, full_finetune, stage1"):
        missed(results)


def test_claims_need_results_of_their_languages(results: Results) -> None:
    results.groups = dict.fromkeys(results.groups, "")  # the evaluation did not name the original languages
    for without in (results, Results()):
        with pytest.raises(UserError, match="learned .*expanded.*--evaluation"):
            missed(without)


def test_judgment_says_what_was_found(results: Results) -> None:
    (learned, *_, check) = Claims.read(DEMO_CLAIMS).judge(
        results, {"check-export": {"equal": False, "max_abs_diff": 0.5}}
    )
    assert learned.found == "stage1 \u221210.0% against base" and learned.value == pytest.approx(-0.1)
    assert (check.name, check.ok, check.found) == ("check-export", False, "largest difference of a tensor 0.5")


@pytest.mark.parametrize(
    "content",
    [
        "claims: [{name: a, claim: b, languages: expanded, change: [x, y]}]",  # no bound
        "claims: [{name: a, claim: b, languages: expanded, change: [x], at_most: 0}]",
        "claims: [{name: a, claim: b, languages: klingon, change: [x, y], at_most: 0}]",
        "claims: [{name: a, claim: b, languages: expanded, change: [x, y], lead: [x, y, z], at_most: 0}]",
        "claims: [{name: a, claim: b, languages: expanded, change: [x, y], at_most: much}]",
        "claims: 3",
    ],
)
def test_incomplete_claims_are_rejected(tmp_path: Path, content: str) -> None:
    path = tmp_path / "claims.yaml"
    path.write_text(content)
    with pytest.raises(UserError, match=r"claims\.yaml .*at_least, at_most"):
        Claims.read(path)


def test_an_unknown_key_of_claims_is_named(tmp_path: Path) -> None:
    path = tmp_path / "results.yaml"
    path.write_text("models: {}\n3: x")
    with pytest.raises(UserError, match=r"--claims \S*results\.yaml: unknown key models, 3; .*demo-claims\.yaml"):
        Claims.read(path)


def test_verification_is_the_last_json_line_of_a_log(tmp_path: Path) -> None:
    path = tmp_path / "check-export.log"
    path.write_text('a warning\n{"equal": true, "num_tensors": 7, "max_abs_diff": null}\n')
    assert read_verifications([path]) == {"check-export": {"equal": True, "num_tensors": 7, "max_abs_diff": None}}
    for content in ("", "text", '{"other": 1}', '{"equal'):
        path.write_text(content)
        with pytest.raises(UserError, match=r"--verification .*verify\.py A B --json"):
            read_verifications([path])
    with pytest.raises(UserError, match="nowhere"):
        read_verifications([tmp_path / "nowhere"])


def test_evaluations_of_several_files_and_versions_are_joined(tmp_path: Path) -> None:
    first, second, old = (tmp_path / name for name in ("results.json", "routing.json", "old.json"))
    interval = {"value": 2.0, "low": 1.9, "high": 2.1}
    english = {"bits_per_byte": interval, "change": {"bits_per_byte": {"value": 0.1, "low": None, "high": None}}}
    models = {"ours": {"languages": {"en": english}, "means": {"mean original": {"bits_per_byte": interval}}}}
    sample = {"prompt": "Turn", "reference": "on", "by_model": {"ours": "off"}}
    first.write_text(json.dumps({"original_languages": ["en"], "models": models, "continuations": {"en": sample}}))
    routing = {"original_first_share": [0.5, None], "layers": [1, 3]}
    second.write_text(json.dumps({"original_languages": ["en"], "models": {"ours": {"languages": {"el": routing}}}}))
    old.write_text(json.dumps({"models": {"base": {"languages": {"el": {"bits_per_byte": 3.0}}}}}))
    results = read_evaluations([first, second, old])
    assert results.groups == {"en": "original", "el": "expanded"}
    assert results.bits["ours"]["en"] == (2.0, 1.9, 2.1) and results.bits["base"]["el"].value == 3.0
    assert results.change("ours", "en").value == 0.1 and not results.change("ours", "en").has_bounds
    assert results.layers["ours"] == [1, 3] and results.routing["original_first_share"]["ours"]["el"][0] == 0.5
    assert results.rows() == {"expanded": ["el"], "original": ["en", "mean original"]}
    assert results.continuations == {"en": sample}


def test_changes_against_another_model_are_computed_again(tmp_path: Path) -> None:
    """The second file compares stage 2 with stage 1, the report with the first file's base."""
    bits = {"base": 2.0, "stage1": 1.5, "stage2": 1.4}
    paths = []
    for first, second in (("base", "stage1"), ("stage1", "stage2")):
        change = {"change": {"bits_per_byte": {"value": bits[second] / bits[first] - 1, "low": None, "high": None}}}
        models = {model: {"languages": {"el": {"bits_per_byte": bits[model]}}} for model in (first, second)}
        models[second]["languages"]["el"] |= change
        paths.append(tmp_path / f"{second}.json")
        paths[-1].write_text(json.dumps({"models": models}))
    results = read_evaluations(paths)
    assert results.change("stage1", "el").value == pytest.approx(-0.25)
    assert results.change("stage2", "el").value == pytest.approx(-0.3)


@pytest.mark.parametrize("content", [None, "{", "[]", '{"models": 3}', '{"models": {"a": {}}}', "[" * 100_000])
def test_file_that_is_not_an_evaluation_is_rejected(tmp_path: Path, content: str | None) -> None:
    path = tmp_path / "results.json"
    if content is not None:
        path.write_text(content)
    with pytest.raises(UserError, match=r"--evaluation .*results\.json"):
        read_evaluations([path])


@pytest.mark.parametrize(
    "spoil",
    [
        lambda content: content.update(original_languages=3),
        lambda content: content.update(continuations=[1]),
        lambda content: content["continuations"]["en"].update(reference=1),
        lambda content: content["continuations"]["en"].update(by_model="a"),
        lambda content: content["models"]["a"]["languages"]["en"].update(bits_per_byte="b"),
        lambda content: content["models"]["a"]["languages"]["en"].update(bits_per_byte=10**400),
        lambda content: content["models"]["a"]["languages"]["en"].update(layers=[0]),
        lambda content: content["models"]["a"]["languages"]["en"].update(original_first_share=[[0.5], 0.5]),
    ],
)
def test_evaluation_with_a_wrong_type_is_rejected(tmp_path: Path, spoil: Callable[[dict[str, Any]], None]) -> None:
    sample = {"prompt": "a", "reference": "b", "by_model": {"a": "c"}}
    english = {"bits_per_byte": 2.0, "layers": [0, 1], "original_first_share": [0.5, math.nan]}
    content = {"models": {"a": {"languages": {"en": english}}}, "continuations": {"en": sample}}
    path = tmp_path / "results.json"
    path.write_text(json.dumps(content))
    read_evaluations([path])
    spoil(content)
    path.write_text(json.dumps(content))
    with pytest.raises(UserError, match=r"--evaluation .*results\.json"):
        read_evaluations([path])


@pytest.mark.parametrize("name", ["same_next_token", "max_abs_diff", "num_tensors"])
def test_verification_with_a_wrong_type_is_rejected(tmp_path: Path, name: str) -> None:
    path = tmp_path / "check.json"
    for value, is_valid in ((1, True), ({}, False), ("x", False)):
        path.write_text(json.dumps({"equal": True, "num_tensors": 1} | {name: value}))
        if is_valid:
            assert read_verifications([path])["check"][name] == 1
        else:
            with pytest.raises(UserError, match=r"--verification .*check\.json"):
                read_verifications([path])


@pytest.mark.parametrize("value", ["x", 3, {"a": 1}, [[1]], math.nan])
def test_records_of_the_start_with_a_wrong_type_are_left_out(tmp_path: Path, value: object) -> None:
    folder = make_run(tmp_path / "run", "stage1", 3, languages={})
    (folder / "command.json").write_text(json.dumps({"arguments": value, "num_ranks": value}))
    (folder / "versions.json").write_text("[" * 100_000)
    run = read_run(folder)
    assert run.arguments == (["[1]"] if isinstance(value, list) else []) and run.versions == {}
    assert run.num_ranks == (3 if value == 3 else None)


def test_start_is_a_pass_before_the_first_step(tmp_path: Path) -> None:
    """If stage 1 had no held-out text, what stage 2 starts from must not pass for the base."""
    runs = [make_run(tmp_path / "stage1", "stage1", 20, languages={}), make_run(tmp_path / "stage2", "stage2", 20)]
    results = held_out_results([read_run(run) for run in runs])
    assert results.models == ["before stage2", "after stage2"] and results.has_start
    metrics = runs[1] / "metrics.jsonl"
    metrics.write_text("".join(line for line in metrics.open() if '"iteration": 0' not in line))
    results = held_out_results([read_run(run) for run in runs])
    assert results.models == ["after stage2"] and not results.has_start


def test_curve_takes_finite_numbers_and_means_of_layers() -> None:
    values = [1.0, None, math.nan, [0.5, None, 1.0], math.inf, "x"]
    curve = curve_of([{"iteration": step, "loss": value} for step, value in enumerate(values)], "loss", "name")
    assert (curve.name, list(curve.x), list(curve.y)) == ("name", [0, 3], [1.0, 0.75])


def test_values_per_layer_are_kept_at_both_ends_only(tmp_path: Path) -> None:
    run = read_run(make_run(tmp_path / "run", "stage1", 3 * ENDS, num_layers=2, languages={}))
    assert len([record for record in run.metrics.steps if isinstance(record["token_share"], list)]) == 2 * ENDS


@pytest.mark.parametrize("content", [None, '{"iteration": 1}\nrubbish\n{"iteration": 2}\n'])
def test_folder_that_is_not_a_run_is_rejected(tmp_path: Path, content: str | None) -> None:
    if content is not None:
        (tmp_path / "metrics.jsonl").write_text(content)
    with pytest.raises(UserError, match=r"metrics\.jsonl") as error:
        read_run(tmp_path)
    assert "\n" not in str(error.value)
    with pytest.raises(UserError, match="nowhere; pass a run folder .*--save"):
        read_run(tmp_path / "nowhere")


def test_run_that_has_been_silent_for_long_has_stopped(tmp_path: Path) -> None:
    folder = make_run(tmp_path / "run", "stage1", 10, is_finished=False, train_iters=20)
    os.utime(folder / "metrics.jsonl", (time.time() - 3600, time.time() - 3600))
    assert read_run(folder).state == "stopped"
    os.utime(folder / "metrics.jsonl")
    assert read_run(folder).state == "running"
