"""The text of the real model, from tiny packages of the same layout as the real ones."""

import json
import shutil
import struct
import zipfile
from pathlib import Path

import pytest

from examples.languages import LANGUAGES
from examples.real_model import package_text, plain_text, text
from examples.real_model.package_text import CAMPAIGNS, HELP_CODES, _scenes, clean, is_sentence, read_stories
from examples.real_model.text import TRAINED, build_corpus, is_held_out, ngrams
from tests.support.debian_packages import write_deb

# A sentence of each language about a number, long enough for n-grams.
SENTENCES = {
    "en": "This page number {} tells you in few plain words what the program does with part {} of a document",
    "es": "Esta página número {} cuenta en pocas palabras qué hace el programa con la parte {} de un documento",
    "zh": "第{}页说明{}部分做些什么事情",
    "el": "Αυτή η σελίδα αριθμός {} λέει με λίγα λόγια τι κάνει το πρόγραμμα με το μέρος {} ενός εγγράφου",
    "hu": "Ez a {} számú oldal néhány egyszerű szóval elmondja mit tesz a program egy dokumentum {} részével",
    "tr": "Bu {} numaralı sayfa program bir belgenin {} bölümüyle ne yapar birkaç sade sözle size anlatır işte",
}
UNTRANSLATED = "Nobody has translated this sentence so far"
PAGES, PARAGRAPHS = 60, 4


def paragraph(language: str, page: int, place: int) -> str:
    return SENTENCES[language].format(f"{page}x", f"{place}y{page}")


def catalog(messages: dict[str, str]) -> bytes:
    """A compiled gettext catalog."""
    messages = {"": "Content-Type: text/plain; charset=UTF-8\n"} | messages
    pairs = sorted((key.encode(), value.encode()) for key, value in messages.items())
    count, table = len(pairs), 28
    data, starts = b"", ([], [])
    for side in (0, 1):
        for pair in pairs:
            starts[side].append((len(pair[side]), table + 16 * count + len(data)))
            data += pair[side] + b"\0"
    numbers = [number for side in starts for entry in side for number in entry]
    head = (0x950412DE, 0, count, table, table + 8 * count, 0, 0)
    return struct.pack(f"<{7 + len(numbers)}I", *head, *numbers) + data


def page_html(language: str, page: int) -> bytes:
    own = "".join(f"<p>{paragraph(language, page, place)} <b>&amp;</b></p>" for place in range(PARAGRAPHS))
    return f"""<html><body><p>{language} words outside of the page {page}</p><div id="DisplayArea">
        <noscript><p>{language} words without any script on {page}</p></noscript>
        <h1>Short</h1><p>{UNTRANSLATED}</p>{own}<p>{paragraph(language, 0, 0)} <b>&amp;</b></p></div>
        <div id="DonationFrame"></div><p>{language} words below the page {page}</p></body></html>""".encode()


def write_packages(folder: Path) -> None:
    folder.mkdir(parents=True)
    for language in LANGUAGES:
        code = HELP_CODES.get(language, language)
        root = f"usr/share/libreoffice/help/{code}"
        pages = {f"{root}/text/swriter/{page}.html": page_html(language, page) for page in range(PAGES)}
        write_deb(folder / f"libreoffice-help-{code.lower()}", {f"{root}/other.html": b"<p>", **pages})
    for number, campaign in enumerate(CAMPAIGNS):
        root = "usr/share/games/wesnoth/1.18"
        numbers = [(1000 * (number + 1) + page, place) for page in range(12) for place in range(PARAGRAPHS)]
        english = {numbers_of: paragraph("en", *numbers_of) for numbers_of in numbers}
        source = "\n".join(f'message= _ "context^{english[pair]}"' for pair in numbers)
        files = {f"{root}/data/campaigns/x/scenarios/1.cfg": source.encode()}
        for language in LANGUAGES[1:]:
            code = {"zh": "zh_CN"}.get(language, language)
            messages = {f"context^{english[pair]}": paragraph(language, *pair) for pair in numbers}
            files[f"{root}/locale/{code}/LC_MESSAGES/wesnoth-{campaign}.mo"] = catalog(messages)
        write_deb(folder / f"wesnoth-1.18-{campaign}", files)
    with zipfile.ZipFile(folder / "homeassistant", "w") as archive:
        for page in range(5000, 5000 + PAGES):
            for language in LANGUAGES:
                code = {"zh": "zh-Hans"}.get(language, language)
                texts = {str(place): paragraph(language, page, place) for place in range(PARAGRAPHS)}
                archive.writestr(f"homeassistant/components/a{page}/translations/{code}.json", json.dumps(texts))


@pytest.fixture(scope="module")
def packages(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("packages") / "downloads"
    write_packages(folder)
    return folder


@pytest.fixture(scope="module")
def corpus(packages: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("real-model") / "corpus"
    with pytest.MonkeyPatch.context() as patch:
        offline(patch, packages)
        build_corpus(folder, packages)
    return folder


def offline(patch: pytest.MonkeyPatch, packages: Path) -> None:
    patch.setattr(package_text, "SCENE_CHARACTERS", 300)
    patch.setattr(
        text, "fetch_all", lambda sources, _: {source.package: packages / source.package for source in sources}
    )


def read(path: Path) -> list[dict]:
    return [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()]


def test_a_held_out_document_is_trained_on_in_no_language(corpus: Path) -> None:
    train = {line["id"] for language in LANGUAGES for line in read(corpus / f"train.{language}.jsonl")}
    unseen = {line["id"] for language in LANGUAGES for line in read(corpus / f"unseen.{language}.jsonl")}
    assert {name.split("/")[0] for name in train} == {*TRAINED}
    assert {name.split("/")[0] for name in unseen} == {*TRAINED, "interface"}
    assert not train & unseen
    for path in corpus.glob("held-out.*.jsonl"):
        kind = path.name.split(".")[1]
        lines = read(path)
        assert lines and {line["id"] for line in lines} <= unseen and {line["kind"] for line in lines} == {kind}


def test_plain_text_has_nothing_that_is_held_out_and_no_code_that_is_measured(packages: Path, tmp_path: Path) -> None:
    wheel = tmp_path / "homeassistant"
    shutil.copy(packages / "homeassistant", wheel)
    with zipfile.ZipFile(wheel, "a") as archive:
        for name in ("sensor", "light"):
            archive.writestr(f"homeassistant/components/a/{name}.py", f"import {name}\n")
        for page in range(7000, 7000 + PAGES):  # each repeats one of the other documents
            repeated = json.dumps({"0": f"{paragraph('es', page - 2000, 0)} and so on"})
            archive.writestr(f"homeassistant/components/b{page}/translations/es.json", repeated)
            archive.writestr(f"homeassistant/components/b{page}/translations/en.json", "{}")
    (tmp_path / "plain").mkdir()
    plain_text.write_texts(tmp_path / "plain", wheel)
    pairs = [(f"a{page}", f"b{page + 2000}") for page in range(5000, 5000 + PAGES)]
    trained = {name for pair in pairs if not any(map(is_held_out, pair)) for name in pair}
    names = {line["id"].removeprefix("interface/") for line in read(tmp_path / "plain" / "es.jsonl")}
    assert 0 < len(trained) < 2 * PAGES and names == trained
    assert [line["text"] for line in read(tmp_path / "plain" / "code.jsonl")] == ["import light"]


def test_pages_lose_markup_repeats_and_what_is_not_translated(corpus: Path) -> None:
    for language in LANGUAGES:
        lines = read(corpus / f"train.{language}.jsonl") + read(corpus / f"unseen.{language}.jsonl")
        found = [text for line in lines if line["kind"] == "help" for text in line["text"].split("\n")]
        places = [(page, place) for page in range(PAGES) for place in range(PARAGRAPHS)]
        expected = {f"{paragraph(language, page, place)} &" for page, place in places}
        assert set(found) - {UNTRANSLATED} == expected
        assert len(found) == len(set(found)) and (UNTRANSLATED in found) == (language == "en")


def test_scenes_are_parallel_and_in_the_order_of_the_game(packages: Path) -> None:
    found = read_stories({path.name: path for path in packages.iterdir()})
    assert found["el"].keys() == found["en"].keys() and len(found["en"]) > len(CAMPAIGNS)
    told = [text for name, scene in found["el"].items() if name.startswith("httt/") for text in scene]
    first = 1000 * (CAMPAIGNS.index("httt") + 1)
    assert told == [paragraph("el", first + page, place) for page in range(12) for place in range(PARAGRAPHS)]


def test_strings_of_a_campaign() -> None:
    source = 'name="a" message= _ "He said ""no"", twice" + _"and\nwent" # _ "x"'
    assert [*_scenes(source)] == [['He said "no", twice', "and\nwent", "x"]]


def test_training_text_shares_no_13_gram_with_held_out_text(packages, tmp_path, monkeypatch) -> None:
    names = [str(number) for number in range(100)]
    seen = next(name for name in names if not is_held_out(name))
    unseen = next(name for name in names if is_held_out(name))
    shared = "one two three four five six seven eight nine ten eleven twelve thirteen"
    documents = {seen: [f"Start {shared} here.", "Something else that is long enough"], unseen: [f"{shared} " * 5]}
    facts = text.write_language(tmp_path, "en", dict.fromkeys([*TRAINED, "interface"], documents))
    assert [line["text"] for line in read(tmp_path / "train.en.jsonl")] == ["Something else that is long enough"] * 2
    overlap = facts["overlap_13_grams"]["help"]
    # The 13 words come five times: 53 n-grams, of which those that start at a "one" are shared.
    assert overlap == {"before_removal": pytest.approx(5 / 53), "after": 0}
    assert facts["removed_from_train"]["documents"] == 2


def test_ngrams_by_hand() -> None:
    words = [f"w{number}" for number in range(14)]
    expected = [tuple(words[:13]), tuple(words[1:])]
    assert [*ngrams(" ".join(words).upper() + ".\nfew words", "en")] == expected
    assert [*ngrams("甲乙丙丁，戊己庚辛壬癸子丑寅卯。", "zh")] == [
        "甲乙丙丁戊己庚辛壬癸子丑寅",
        "乙丙丁戊己庚辛壬癸子丑寅卯",
    ]


def test_two_builds_have_the_same_bytes_and_a_corpus_is_kept(corpus, packages, tmp_path, monkeypatch) -> None:
    offline(monkeypatch, packages)
    facts = build_corpus(tmp_path / "corpus", packages)
    assert sorted(path.name for path in corpus.iterdir()) == sorted(
        path.name for path in (tmp_path / "corpus").iterdir()
    )
    for path in corpus.iterdir():
        assert path.read_bytes() == (tmp_path / "corpus" / path.name).read_bytes()
    monkeypatch.setattr(text, "fetch_all", None)
    assert build_corpus(tmp_path / "corpus", tmp_path / "no cache") == facts


def test_sentences() -> None:
    assert is_sentence("Άνοιξε το παράθυρο της εφαρμογής", "el")
    assert not is_sentence("Open the window of the application", "el")
    assert not is_sentence("Open the window of the application", "tr")
    assert not is_sentence("Pencereyi açmak için <b>buna</b> basın", "tr")
    assert not is_sentence("Yalnızca dört kısa sözcük", "tr")
    assert clean({language: {"a": ["Same in all of the languages"]} for language in LANGUAGES})["hu"] == {}
