"""Evaluation results and metadata become the front matter that the Hub reads; the card's text stays."""

import json
from pathlib import Path

import pytest
from huggingface_hub import ModelCard
from huggingface_hub.repocard import metadata_load

from checkpoint_convert import update_card as command
from checkpoint_convert.card.front_matter import inherited

CARD = "---\nlicense: mit\nlanguage: en\ntags:\n- moe\n---\n\n# A model\n\n---\nText.\n"


@pytest.fixture
def export(tmp_path: Path) -> Path:
    (tmp_path / "export").mkdir()
    (tmp_path / "export" / "README.md").write_text(CARD)
    return tmp_path / "export"


@pytest.fixture
def results(export: Path) -> Path:
    """As `moelpr.measure.evaluate --output` writes them: two languages, two models."""

    def model(directory: str, bits: float) -> dict:
        numbers = {"bits_per_byte": {"value": bits}, "perplexity": {"value": 9.5}, "accuracy": {"value": 0.25}}
        return {"directory": directory, "languages": {code: {"documents": 12, **numbers} for code in ("en", "el")}}

    data = {"en": "/private/home/me/en-test.jsonl", "el": "el-test.jsonl"}
    models = {"base": model("Base", 1.5), "stage2": model(str(export), 1.25)}
    (export.parent / "results.json").write_text(json.dumps({"data": data, "models": models}))
    return export.parent / "results.json"


def test_results_become_a_model_index_that_the_hub_reads(export: Path, results: Path, exit_code, capsys) -> None:
    options = ("--base-model", "o/Base", "--languages", "hu,en", "--tags", "multilingual,moe")
    assert exit_code(command.main, export, "--results", results, *options) == 0
    assert "results on 2 data sets" in capsys.readouterr().out
    card = ModelCard.load(export / "README.md")
    assert card.text == ModelCard(CARD).text
    assert card.data.base_model == "o/Base" and card.data.license == "mit"
    assert card.data.language == ["en", "hu", "el"] and card.data.tags == ["moe", "multilingual"]
    actual = {(r.dataset_config, r.metric_type): r.metric_value for r in card.data.eval_results}
    assert actual == {
        (code, metric): value
        for code in ("en", "el")
        for metric, value in (("bits_per_byte", 1.25), ("perplexity", 9.5), ("accuracy", 0.25))
    }
    names = {f"held-out {language} text, 12 documents" for language in ("English", "Greek")}
    assert {r.dataset_name for r in card.data.eval_results} == names
    assert "private" not in (export / "README.md").read_text()
    # A second time changes nothing.
    before = (export / "README.md").read_bytes()
    assert exit_code(command.main, export, "--results", results, *options) == 0
    assert (export / "README.md").read_bytes() == before
    assert exit_code(command.main, export, "--results", results, "--evaluated", "base") == 0
    assert "value: 1.5" in (export / "README.md").read_text()


def test_benchmarks_become_results_too(export: Path, exit_code) -> None:
    change = {"value": -0.5, "low": -1.0, "high": 0.25, "is_clear": False}
    scores = {"el": {"value": 41.5, "stderr": 1.0}, "en": {"value": 50.0, "low": 48.0, "high": 52.0, "change": change}}
    content = {
        "settings": {"limit": None},
        "benchmarks": {"ARC": {"num_fewshot": 25, "metric": "acc_norm"}},
        "models": {"export": {"directory": str(export), "scores": {"ARC": scores}}},
    }
    file = export.parent / "harness.json"
    file.write_text(json.dumps(content))
    assert exit_code(command.main, export, "--results", file) == 0
    greek, english = metadata_load(export / "README.md")["model-index"][0]["results"]
    assert greek == {
        "task": {"type": "text-generation"},
        "dataset": {"name": "ARC, Greek", "type": "arc", "config": "el"},
        "metrics": [{"type": "acc_norm", "value": 41.5, "name": "acc_norm, 25 shots"}],
    }
    name = english["metrics"][0]["name"]
    assert "48.0 to 52.0" in name and "\u22120.50 [\u22121.00, +0.25]" in name


def test_invalid_input_exits_with_one_message_and_leaves_the_card(export, results, refused) -> None:
    model = {"directory": str(export)}
    for content, message in (
        (None, "other.json"),
        ("{", "other.json"),
        (results.read_text().replace('"value": ', '"value": "x", "other": '), "other.json"),
        (results.read_text().replace("9.5", "null"), "other.json has no perplexity"),
        (json.dumps({"models": {"m": model | {"languages": {"en": {}}}}}), "other.json has no bits_per_byte"),
        (json.dumps({"settings": {"limit": 5}, "benchmarks": {}, "models": {"m": model | {"scores": {}}}}), "--limit"),
    ):
        other = export.parent / "other.json"
        other.write_text(content) if content else None
        assert message in refused(command.main, export, "--results", other)
    for arguments, message in (
        ((export,), "--results"),
        ((export.parent, "--license", "mit"), "README.md"),
        ((export, "--results", results, "--evaluated", "stage3"), "base, stage2"),
        ((export, "--base-model", "runs"), "--base-model must be OWNER/NAME"),
        ((export, "--languages", "el,Greek"), "got Greek"),
    ):
        assert message in refused(command.main, *arguments)
    assert (export / "README.md").read_text() == CARD


@pytest.mark.parametrize(("given", "found"), [("[en, no, nb]", ["en", "no", "nb"]), ("no", "no"), ("[en]", ["en"])])
def test_norwegian_is_no_boolean(tmp_path: Path, given: str, found: object) -> None:
    (tmp_path / "README.md").write_text(f"---\nlanguage: {given}\n---\nText.\n")
    assert inherited(tmp_path, ("language",)) == {"language": found}


@pytest.mark.parametrize("hostile", ["a: [", "- a", "tags: 5", "model-index: [1]"])
def test_front_matter_that_is_not_a_cards_is_named_or_not_inherited(export: Path, refused, hostile) -> None:
    (export / "README.md").write_text(f"---\n{hostile}\n---\nText.\n")
    assert inherited(export, ("license", "tags")) == {}
    assert "README.md" in refused(command.main, export, "--license", "mit")


def test_a_card_without_front_matter_gets_one(export: Path, exit_code, capsys) -> None:
    (export / "README.md").write_text("Text.\n")
    assert exit_code(command.main, export, "--license", "mit") == 0
    assert (export / "README.md").read_text() == "---\nlicense: mit\n---\nText.\n"
    assert not capsys.readouterr().err
