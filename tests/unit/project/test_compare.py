"""Finished projects against their base: numbers by hand, intervals, the picture, and what cannot be compared."""

import json
import random
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any
from xml.etree import ElementTree

import pytest
import torch
from safetensors.torch import load_file, save_file

from moelpr.base.errors import UserError
from moelpr.base.yaml_files import dump
from moelpr.measure.evaluate import compare as evaluation
from moelpr.measure.evaluate.compare import compare_models
from moelpr.project import compare as command
from moelpr.project.reading import read_project
from moelpr.project.resolved import ResolvedProject
from tests.support.commands import moelpr

Finish = Callable[..., Path]
TEXTS = ("el", "hu", "en", "code", "fr")


def documents(name: str) -> list[str]:
    """Runs of a, each a token, which end with b."""
    draw = random.Random(name)
    return ["b".join("a" * draw.randrange(1, 30) for _ in range(5)) for _ in range(12)]


@pytest.fixture
def finish(qwen2: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Finish:
    """Write a languages.yaml in the current folder, and as its result the base with noise."""
    monkeypatch.chdir(tmp_path)
    shutil.copytree(qwen2, tmp_path / "base")
    for name in TEXTS:
        (tmp_path / f"{name}.jsonl").write_text("".join(json.dumps({"text": x}) + "\n" for x in documents(name)))
        (tmp_path / f"train.{name}.jsonl").write_text('{"text": "ab"}\n')

    def finish(name: str, noise: float, **changes: Any) -> Path:
        text = {code: {"text": f"train.{code}.jsonl", "held_out": f"{code}.jsonl"} for code in TEXTS}
        languages = {"expanded": {"el": text["el"], "hu": text["hu"]}, "original": {"en": text["en"]}}
        content = {"model": "base", "output": f"runs/{name}", "languages": languages, "budget": {"epochs": 1}}
        content["method"] = "moe-lpr"
        path = tmp_path / f"{name}.yaml"
        path.write_text(dump(content | changes))
        model = tmp_path / "runs" / name / "hf"
        shutil.copytree(qwen2, model)
        torch.manual_seed(len(name))
        for file in model.glob("*.safetensors"):
            tensors = {key: value + noise * torch.randn_like(value) for key, value in load_file(file).items()}
            save_file(tensors, file, {"format": "pt"})
        return path

    return finish


def test_means_are_those_of_changes_per_text_with_intervals_and_a_picture(
    finish, monkeypatch, capsys, tmp_path
) -> None:
    little, much = finish("little", 0.01), finish("much", 0.1)
    arguments = (little, much, "--data", "fr=fr.jsonl", "--output", "out", "--max-documents", 10)
    moelpr("compare", *arguments)
    actual = json.loads((tmp_path / "out/compare.json").read_text())
    assert actual["groups"] == {"expanded": ["el", "hu"], "kept": ["en"], "other": ["fr"]}
    models = {"base": Path("base"), "little": Path("runs/little/hf"), "much": Path("runs/much/hf")}
    texts = {text: documents(text)[:10] for text in ("el", "hu", "en", "fr")}
    scores = compare_models(models, texts, base=models["base"], device="cpu").scores
    for label, project in actual["projects"].items():
        ratios = {
            text: sum(scores[label][text].document_bits) / sum(scores["base"][text].document_bits) for text in texts
        }
        for group, members in actual["groups"].items():
            mean = project["means"][group]
            assert mean["change"]["value"] == pytest.approx(sum(ratios[text] - 1 for text in members) / len(members))
            nats = [sum(scores[label][x].document_distances) / sum(scores[label][x].document_tokens) for x in members]
            assert mean["distance"]["value"] == pytest.approx(sum(nats) / len(nats))
            assert all(one["low"] <= one["value"] <= one["high"] for one in mean.values())
        assert project["texts"]["fr"]["change"] == project["means"]["other"]["change"]
    small, large = (actual["projects"][label]["means"]["kept"] for label in ("little", "much"))
    assert small["against_first"] == {"value": 0, "low": 0, "high": 0}
    assert large["against_first"]["value"] == pytest.approx(large["change"]["value"] - small["change"]["value"])
    assert 0 < small["distance"]["high"] < large["distance"]["low"]

    svg = (tmp_path / "out/compare.svg").read_text()
    words = ["".join(text.itertext()) for text in ElementTree.fromstring(svg).iter("{http://www.w3.org/2000/svg}text")]
    assert [words.count(word) for word in ("little", "much", "base")] == [2, 2, 2]
    markdown, printed = (tmp_path / "out/compare.md").read_text(), capsys.readouterr().out
    number = f"{large['distance']['value']:.4f} [{large['distance']['low']:.4f}, {large['distance']['high']:.4f}]"
    assert number in markdown and number in printed and "](compare.svg)" in markdown

    monkeypatch.setattr(evaluation, "open_model", None)  # nothing is measured again
    moelpr("compare", *arguments, "--json")
    assert json.loads(capsys.readouterr().out) == actual


def test_kept_text_counts_as_lost_and_a_new_tokenizer_has_no_distance(finish, monkeypatch, tmp_path, capsys) -> None:
    text = {code: {"text": f"train.{code}.jsonl", "held_out": f"{code}.jsonl"} for code in ("el", "en", "code", "fr")}
    languages = {"expanded": {"el": text["el"]}, "original": {"en": text["en"]}}
    kept = finish("kept", 0.05, languages=languages | {"kept": {"code": "code.jsonl"}})
    languages["original"] |= {"code": text["code"], "fr": text["fr"]}  # another's kept text, and a language of its own
    longer = finish("longer", 0.05, languages=languages, vocabulary={"new_tokens": 9})
    moelpr("compare", kept, longer, "--device", "cpu")
    actual = json.loads((tmp_path / "comparison/compare.json").read_text())
    assert actual["groups"] == {"expanded": ["el"], "kept": ["en", "code", "fr"]}
    assert actual["settings"]["sequence_length"] == 64
    assert actual["projects"]["longer"]["texts"].keys() == {"el", "en", "code", "fr"}
    assert "distance" in actual["projects"]["kept"]["texts"]["code"]
    assert not any("distance" in numbers for numbers in actual["projects"]["longer"]["means"].values())
    assert "longer against kept, lost: text to keep" in capsys.readouterr().out


def test_projects_that_cannot_be_compared_are_one_sentence(finish, monkeypatch, tmp_path) -> None:
    first = finish("first", 0)
    shutil.copytree(tmp_path / "base", tmp_path / "copy")
    (tmp_path / "other.jsonl").write_text('{"text": "aab"}\n')
    unfinished = finish("unfinished", 0)
    shutil.rmtree(tmp_path / "runs/unfinished/hf")
    en, el = ({"text": f"train.{code}.jsonl", "held_out": f"{code}.jsonl"} for code in ("en", "el"))
    fewer = {"expanded": {"el": el}, "original": {"en": en}}
    both = {
        "expanded": {"el": el, "hu": el | {"text": "train.hu.jsonl"}},
        "original": {"en": en | {"held_out": "other.jsonl"}},
    }
    for arguments, expected in [
        ((first, unfinished), ("unfinished.yaml", "runs/unfinished/hf", "moelpr run")),
        ((first, finish("moved", 0, model="copy")), ("moved.yaml", "copy", "first.yaml", "base")),
        ((first, finish("fewer", 0, languages=fewer)), ("fewer.yaml", "expanded", "el, hu", "first.yaml")),
        ((first, finish("edited", 0, languages=both)), ("hu.jsonl", "el.jsonl")),
        ((first, first), ("first.yaml", "twice")),
        ((first, "--data", "el=el.jsonl"), ("--data", "el")),
        ((first, "--data", "el.jsonl"), ("--data", "=")),
        ((first, "--device", "abacus"), ("--device", "abacus")),
        ((tmp_path / "no.yaml",), ("no.yaml",)),
    ]:
        with pytest.raises(UserError) as error:
            moelpr("compare", *arguments)
        message = str(error.value)
        assert "\n" not in message and all(part in message for part in expected), message


def test_projects_are_named_by_what_they_differ_in(finish, tmp_path) -> None:
    (tmp_path / "more").mkdir()
    paths = [finish("one", 0), finish("two", 0), finish("moe-lpr", 0, method="full"), tmp_path / "more/two.yaml"]
    shutil.copy(paths[1], paths[3])
    one, two, full, other = (ResolvedProject(read_project(path)) for path in paths)
    for projects, names in (
        ([one, full], ["moe-lpr", "full"]),
        ([one, two, full], ["one", "two", "moe-lpr"]),
        ([two, other], [str(paths[1]), str(paths[3])]),
    ):
        assert [*command.labelled(projects)] == names
