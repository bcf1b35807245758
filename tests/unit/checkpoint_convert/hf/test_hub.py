"""Models named as on the Hub are downloaded without pickles and code, from a server that answers as the Hub does."""

import json
import re
import shutil
from collections.abc import Iterator
from pathlib import Path

import pytest
from huggingface_hub import ModelCard, constants

from checkpoint_convert import convert as importer
from checkpoint_convert.compare.tensors import compare
from checkpoint_convert.conversions.exported_model import mcore_to_hf
from checkpoint_convert.hf.hub import find_model
from tests.support.commands import moelpr
from tests.support.hf_models import assert_nothing_left
from tests.support.local_hub import LocalHub, local_hub


@pytest.fixture
def hub(source: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[LocalHub]:
    """o/Tiny with the files of `source`, and much that must not be downloaded."""
    (source / "README.md").write_text("---\nlicense: mit\n---\n")
    (source / "pytorch_model.bin").write_bytes(b"a pickle")
    (source / "modeling_tiny.py").write_text("raise SystemExit")
    (source / "original").mkdir()
    for name in ("consolidated.safetensors", "original/model.safetensors"):
        shutil.copyfile(source / "model.safetensors", source / name)
    with local_hub() as hub:
        files = [path for path in source.rglob("*") if path.is_file()]
        hub.repositories["o/Tiny"] = {str(path.relative_to(source)): path.read_bytes() for path in files}
        hub.gated.add("o/Gated")
        hub.use(monkeypatch, tmp_path / "cache")
        yield hub


def test_a_name_on_the_hub_is_downloaded_and_its_commit_recorded(hub, source, tmp_path, monkeypatch, exit_code) -> None:
    arguments = "--hf-path", "o/Tiny", "--num-new-experts", 2, "--save"
    assert exit_code(importer.main, *arguments, tmp_path / "out") == 0
    tokenizer = {"tokenizer.json", "tokenizer_config.json", "chat_template.jinja"}
    assert hub.downloads == tokenizer | {"config.json", "generation_config.json", "model.safetensors", "README.md"}
    origin = json.loads((tmp_path / "out" / "hf" / "origin.json").read_text())
    assert (origin["base_model"], origin["revision"]) == ("o/Tiny", hub.commit("o/Tiny"))
    mcore_to_hf(tmp_path / "out", tmp_path / "export")
    card = ModelCard.load(tmp_path / "export" / "README.md")
    assert card.data.base_model == "o/Tiny" and hub.commit("o/Tiny") in card.text
    (tmp_path / "en.jsonl").write_text(99 * '{"text": "a b"}\n')
    moelpr("pack", "keep", "o/Tiny", "--text", tmp_path / "en.jsonl", "--device", "cpu", "--save", tmp_path / "kept")
    assert json.loads((tmp_path / "kept" / "pack.json").read_text())["base"] == "o/Tiny"
    # Again without a network: the cache has it.
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)
    assert exit_code(importer.main, *arguments, tmp_path / "offline") == 0
    pinned = "--hf-path", f"o/Tiny@{hub.commit('o/Tiny')}", "--num-new-experts", 2, "--save", tmp_path / "pinned"
    assert exit_code(importer.main, *pinned) == 0
    for save in ("offline", "pinned"):
        assert not any(verdict.differs(0) for verdict in compare(tmp_path / "out", tmp_path / save))


def test_a_folder_of_this_name_comes_first(hub: LocalHub, source: Path, tmp_path: Path, monkeypatch) -> None:
    monkeypatch.chdir(tmp_path)
    shutil.copytree(source, "o/Tiny")
    actual = find_model(Path("o/Tiny"))
    assert (actual.folder, actual.name, actual.revision) == (Path("o/Tiny"), "Tiny", None)
    assert not hub.asked
    assert find_model(Path("o/Tiny@main")).name == "o/Tiny" and hub.asked


def test_what_can_not_be_downloaded_is_one_sentence_and_code_2(hub, source, tmp_path, monkeypatch, refused):
    for name, changed, message in (
        ("o/Gone", {}, "the Hub has no model o/Gone, or it is private; correct the name"),
        ("o/Gated", {}, "o/Gated is gated; accept its conditions"),
        ("o/Tiny@never", {}, "can't be downloaded"),
        ("o/Tiny", {"ENDPOINT": "http://127.0.0.1:1"}, "the Hub can't be reached"),
        ("o/Tiny", {"HF_HUB_OFFLINE": True}, "HF_HUB_OFFLINE is set"),
        (tmp_path / "nowhere", {}, "hf download"),  # no name on the Hub
    ):
        for constant, value in changed.items():
            monkeypatch.setattr(constants, constant, value)
        error = refused(importer.main, "--hf-path", name, "--dense", "--save", tmp_path / "out")
        assert re.search(message, error) and not (tmp_path / "out").exists()
        assert_nothing_left(tmp_path)
