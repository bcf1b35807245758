"""The pack of other text: translated pages, code and dialogues, with licences, without the languages left out."""

import json
import zipfile
from pathlib import Path

import pytest

from examples import other_text
from examples.downloads import read_sources
from examples.languages import LANGUAGES
from examples.other_text import SOURCES, main
from moelpr.base.errors import UserError
from moelpr.data.text.reading import read_documents

FOLDER = read_sources(SOURCES)["gnome-user-docs"].folder


def page(*texts: str) -> bytes:
    body = "".join(f"<p>{text}</p>" for text in texts)
    info = "<info><desc>about</desc><credit><name>Someone</name></credit></info>"
    return f'<page xmlns="http://projectmallard.org/1.0/">{info}<title>{texts[0]}</title>{body}</page>'.encode()


@pytest.fixture
def packages(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Path:
    """The packages, as if they had been downloaded: pages, source files, and dialogues."""
    polish = [f"Zdanie numer {number} o muzyce <em>i</em>\n  morzu. " * 3 for number in range(4)]
    english = [f"Sentence {number} about music and the sea. " * 3 for number in range(4)]
    pages = {f"{FOLDER}C/gnome-help/{name}.page": page(*english) for name in ("one", "two")}
    pages |= {f"{FOLDER}{code}/gnome-help/one.page": page(*polish) for code in ("pl", "fi", "tr", "sr@latin", "pt_BR")}
    pages |= {f"{FOLDER}pl/gnome-help/two.page": page(polish[0], *english[1:])}

    def read_deb(path: Path, folder: str, suffix: str = "") -> dict[str, bytes]:
        return pages if folder == FOLDER else {f"{folder}a{suffix}": f"code {suffix} ".encode() * 60}

    monkeypatch.setattr(other_text, "read_deb", read_deb)
    with zipfile.ZipFile(tmp_path / "chat.whl", "w") as archive:
        for folder in ("english", "turkish", "dutch"):
            talk = {"conversations": [["Hello", "Hi, what is it?", "Nothing."], ["Alone"], ["x", {"y": 1}]]}
            archive.writestr(f"chatterbot_corpus/data/{folder}/talk.yml", json.dumps(talk))
    paths = dict.fromkeys(read_sources(SOURCES), tmp_path / "a.deb") | {"chatterbot-corpus": tmp_path / "chat.whl"}
    monkeypatch.setattr(other_text, "fetch_all", lambda sources, cache: paths)
    return tmp_path


def test_the_pack_has_translated_pages_code_and_dialogues(packages: Path, capsys: pytest.CaptureFixture[str]) -> None:
    main(["--output", str(packages / "out"), "--without", "fi"])
    actual = {path.stem: [json.loads(x) for x in path.open()] for path in (packages / "out").glob("*.jsonl")}
    assert actual.keys() == {"pl", "code", "chat"}  # Finnish and the demo's Turkish are left out, as are variants
    (polish,) = actual["pl"]  # the second page is mostly English
    assert polish["text"].startswith("Zdanie numer 0 o muzyce i morzu.") and "Someone" not in polish["text"]
    assert len({document["code"] for document in actual["code"]}) >= 4
    assert [document["language"] for document in actual["chat"]] == ["nl", "en"]
    turns = ("user", "Hello"), ("assistant", "Hi, what is it?"), ("user", "Nothing.")
    assert actual["chat"][0]["text"] == "".join(f"<|im_start|>{who}\n{said}<|im_end|>\n" for who, said in turns)
    pack = json.loads((packages / "out" / "pack.manifest.json").read_text())
    assert pack.keys() == {f"{name}.jsonl" for name in actual}
    assert all(file["licence"] and file["packages"] for file in pack.values())
    assert pack["code.jsonl"]["documents"] == len(actual["code"])
    assert len(read_documents(packages / "out")) == sum(map(len, actual.values()))  # the record is not read as text
    assert "1 languages, code and dialogues" in capsys.readouterr().out


def test_every_language_is_limited_and_wrong_values_are_one_sentence(packages: Path) -> None:
    command = ["--output", str(packages / "out"), "--kilobytes"]
    with pytest.raises(UserError, match="--kilobytes must be at least 1"):
        main([*command, "0"])
    main([*command, "1"])
    pack = json.loads((packages / "out" / "pack.manifest.json").read_text())
    assert all(file["bytes"] <= 1000 for name, file in pack.items() if name != "code.jsonl")
    with pytest.raises(UserError, match="already exists"):
        main([*command, "1"])


def test_no_source_is_of_the_demos_languages_and_all_are_pinned() -> None:
    sources = read_sources(SOURCES)
    assert not any(f"-{language}" in name for name in sources for language in LANGUAGES)
    assert all(len(source.sha256) == 64 and source.licence for source in sources.values())
    assert len({source.kind for source in sources.values()} - {"documentation", "chat"}) >= 4
