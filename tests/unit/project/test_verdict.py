"""The verdict: numbers of the evaluation, and the one sentence that follows from them."""

import json
from pathlib import Path

import pytest

from moelpr.base.run_folder import BestStep
from moelpr.project.reading import read_project
from moelpr.project.resolved import ResolvedProject
from moelpr.project.verdict import verdict
from tests.unit.project.conftest import Write, write_findings


def of_languages(*changes: tuple[float, ...]) -> dict:
    """The results of a model: changes with their bounds, if they have some, of Greek, Hungarian and English."""
    intervals = (dict(zip(("value", "low", "high"), change, strict=False)) for change in changes)
    results = [{"change": {"bits_per_byte": interval}} for interval in intervals]
    return {"languages": dict(zip(("el", "hu", "en"), results, strict=True))}


def measured(write: Write, *changes: tuple[float, ...], **models: dict) -> str:
    """The verdict on changes of the one model, or on several, whose routers kept little."""
    Path("out/evaluation").mkdir(parents=True)
    content = {"base": {"languages": {}}} | ({"moe-lpr": of_languages(*changes)} if changes else models)
    Path("out/evaluation/results.json").write_text(json.dumps({"models": content}))
    if models:
        write_findings(distance=0.02, kept=0.6)
    return verdict(ResolvedProject(read_project(write(**({"method": "auto", "experts": None} if models else {})))))


@pytest.mark.parametrize(
    ("hungarian", "english", "sentences"),
    [
        ((-0.1, -0.12, -0.08), (0.001, -0.01, 0.02), ["Worth serving", "More text of Hungarian"]),
        ((-0.1, -0.12, -0.08), (0.05, 0.04, 0.06), ["English: lost by more than 3%; raise replay.original_documents"]),
        ((-0.01, -0.03, 0.01), (0.05, -0.01, 0.11), ["Hungarian: not clearly learned"]),
        ((-0.004, -0.005, -0.003), (0.0, -0.01, 0.01), ["Hungarian: hardly learned, by less than 1%; raise the bud"]),
        ((0.01, 0.005, 0.02), (0.05, 0.04, 0.06), ["Hungarian: not clearly learned", "English: lost"]),
    ],
)
def test_the_sentence_follows_from_the_numbers(write: Write, hungarian, english, sentences: list[str]) -> None:
    text = measured(write, (-0.2, -0.22, -0.18), hungarian, english)
    assert "learned: Greek \u221220.0%, Hungarian" in text and "next: moelpr chat out/hf" in text
    every = ("Worth serving", "More text", "not clearly learned", "hardly learned", "lost by")
    assert all(sentence in text for sentence in sentences)
    assert sum(part in text for part in every) == len(sentences)


def test_without_intervals_the_values_decide(write: Write) -> None:
    assert "Worth serving" in measured(write, (-0.2,), (-0.1,), (0.001,))


def test_languages_with_few_documents_are_named(write: Write) -> None:
    of = of_languages((-0.2,), (-0.1,), (0.0,))
    for code, documents in (("el", 400), ("hu", 8), ("en", 19)):
        of["languages"][code]["documents"] = documents
    text = measured(write, **{"second-ffn": of})
    assert "few documents are held out: Hungarian, English (fewer than 20).\n" in text


def test_lost_languages_without_intervals_are_named(write: Write) -> None:
    assert "English: lost" in measured(write, (-0.2,), (-0.1,), (0.04,))


def test_a_language_that_routers_do_not_keep_is_named_and_the_model_not_worth_serving(write: Write) -> None:
    Path("out/evaluation").mkdir(parents=True)
    content = {"models": {"base": {"languages": {}}, "second-ffn": of_languages((-0.2,), (-0.1,), (0.04,))}}
    Path("out/evaluation/results.json").write_text(json.dumps(content))
    write_findings(distance=0.02, kept=0.9, change=0.04)
    findings = json.loads(Path("out/hf/calibration.json").read_text())
    texts = findings["findings"]["texts"]
    texts["code"] = texts.pop("en")
    Path("out/hf/calibration.json").write_text(json.dumps(findings))
    text = verdict(ResolvedProject(read_project(write(method="second-ffn", experts=None))))
    assert "reads it like the new languages: en." in text and "English: not kept by the routers" in text
    assert "Worth serving" not in text and "Hardly" not in text
    assert "Worse than by the base, though kept: code (+4.0%); add more such text." in text
    text = verdict(ResolvedProject(read_project(write(method="auto", experts=None))))  # no review followed
    assert "English: lost by more than 3%; add such text under languages.kept" in text
    write_findings(distance=0.02, kept=0.06)
    text = verdict(ResolvedProject(read_project(write(method="second-ffn", experts=None))))
    assert "Hardly worth serving: the second FFN keeps 6% of what was learned (at least 85%); add" in text


@pytest.mark.parametrize("review, model", [(-0.3, "out/review-hf"), (-0.1, "out/hf")])
def test_the_better_one_of_two_is_to_be_served(write: Write, review: float, model: str) -> None:
    models = {"second-ffn": of_languages((-0.2,), (-0.2,), (0.0,)), "review": of_languages((review,), (-0.2,), (0.0,))}
    text = measured(write, **models)
    assert f"model: {model}\n" in text and f"next: moelpr chat {model}" in text
    assert "60% of what was learned is left, 0.020 nats" in text and "most on en (0.020)" in text
    assert "review followed, as the second FFN keeps 60% of what was learned (at least 85%).\n" in text


def test_a_stop_by_held_out_text_is_said_with_what_it_saved(write: Write) -> None:
    Path("out/stage1").mkdir(parents=True)
    BestStep(300, 2.0, 400, 1600).write(Path("out/stage1"))
    text = measured(write, (-0.2, -0.22, -0.18), (-0.1, -0.12, -0.08), (0.001, -0.01, 0.02))
    assert "after step 400 of 1,600, so 75% of the steps were saved; step 300 is the result" in text
