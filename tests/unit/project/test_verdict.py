"""The verdict: numbers of the evaluation, and the one sentence that follows from them."""

import json
from pathlib import Path

import pytest

from moelpr.project.reading import read_project
from moelpr.project.resolved import ResolvedProject
from moelpr.project.verdict import verdict
from tests.unit.project.conftest import Write


def measured(write: Write, *changes: tuple[float, float, float], **settings: object) -> str:
    """The verdict on changes with their bounds, of Greek, Hungarian and English."""
    languages = {
        code: {"change": {"bits_per_byte": dict(zip(("value", "low", "high"), change, strict=True))}}
        for code, change in zip(("el", "hu", "en"), changes, strict=True)
    }
    Path("out/evaluation").mkdir(parents=True)
    models = {"base": {"languages": {}}, "moe-lpr": {"languages": languages}}
    Path("out/evaluation/results.json").write_text(json.dumps({"models": models}))
    return verdict(ResolvedProject(read_project(write(**settings))))


@pytest.mark.parametrize(
    ("hungarian", "english", "sentences"),
    [
        ((-0.1, -0.12, -0.08), (0.001, -0.01, 0.02), ["Worth serving", "More text of Hungarian"]),
        ((-0.1, -0.12, -0.08), (0.05, 0.04, 0.06), ["English: lost by more than 3%; raise replay.original_documents"]),
        ((-0.01, -0.03, 0.01), (0.05, -0.01, 0.11), ["Hungarian: not clearly learned"]),
        ((0.01, 0.005, 0.02), (0.05, 0.04, 0.06), ["Hungarian: not clearly learned", "English: lost"]),
    ],
)
def test_the_sentence_follows_from_the_numbers(write: Write, hungarian, english, sentences: list[str]) -> None:
    text = measured(write, (-0.2, -0.22, -0.18), hungarian, english)
    assert "learned: Greek \u221220.0%, Hungarian" in text and "next: moelpr chat out/hf" in text
    every = ("Worth serving", "More text", "not clearly learned", "lost by")
    assert all(sentence in text for sentence in sentences)
    assert sum(part in text for part in every) == len(sentences)
