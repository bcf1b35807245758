"""The text of the experiments, from tiny packages of the same layout as the real ones."""

import json
import struct
import zipfile
from pathlib import Path

import pytest

from examples.experiments import package_text
from examples.experiments.package_text import CAMPAIGNS, HELP_CODES, clean, is_sentence, read_stories
from examples.experiments.text import NEAR, PLAIN, UNSEEN, is_held_out, ngrams, training_text, write_texts
from examples.languages import LANGUAGES
from tests.support.debian_packages import write_deb
from tests.support.hf_models import files_of

# A sentence of each language about a number, long enough for n-grams.
SENTENCES = {
    "en": "This page number {} tells you in few plain words what the program does with part {} of a document",
    "es": "Esta página número {} cuenta en pocas palabras qué hace el programa con la parte {} de un documento",
    "zh": "第{}页说明{}部分做些什么事情",
    "el": "Αυτή η σελίδα αριθμός {} λέει με λίγα λόγια τι κάνει το πρόγραμμα με το μέρος {} ενός εγγράφου",
    "hu": "Ez a {} számú oldal néhány egyszerű szóval elmondja mit tesz a program egy dokumentum {} részével",
    "tr": "Bu {} numaralı sayfa program bir belgenin {} bölümüyle ne yapar birkaç sade sözle size anlatır işte",
}
SENTENCES |= {language: f"{language} {SENTENCES['es']}" for language in (*NEAR, *UNSEEN)}
UNTRANSLATED = "Nobody has translated this sentence so far"
PAGES, PARAGRAPHS = 60, 4


def paragraph(language: str, page: int, place: int) -> str:
    return SENTENCES[language].format(f"{page}x", f"{place}y{page}")


def catalog(messages: dict[str, str]) -> bytes:
    """A compiled gettext catalog."""
    messages = {"": "Content-Type: text/plain; charset=UTF-8\n"} | messages
    keys, values = zip(*sorted((key.encode(), value.encode()) for key, value in messages.items()), strict=True)
    numbers, data = [0x950412DE, 0, len(keys), 28, 28 + 8 * len(keys), 0, 0], b""
    for text in (*keys, *values):
        numbers += [len(text), 28 + 16 * len(keys) + len(data)]
        data += text + b"\0"
    return struct.pack(f"<{len(numbers)}I", *numbers) + data


def page_html(language: str, page: int) -> bytes:
    own = "".join(f"<p>{paragraph(language, page, place)} <b>&amp;</b></p>" for place in range(PARAGRAPHS))
    return f"""<html><body><p>{language} words outside of the page {page}</p><div id="DisplayArea">
        <noscript><p>{language} words without any script on {page}</p></noscript>
        <h1>Short</h1><p>{UNTRANSLATED}</p>{own}<p>{paragraph(language, 0, 0)} <b>&amp;</b></p></div>
        <div id="DonationFrame"></div><p>{language} words below the page {page}</p></body></html>""".encode()


def write_packages(folder: Path) -> None:
    folder.mkdir(parents=True)
    for language in (*LANGUAGES, *NEAR):
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
            archive.writestr(f"homeassistant/components/a{page}/light.py", f"import light_{page}\n")
            for language in (*LANGUAGES, *UNSEEN):
                code = {"zh": "zh-Hans"}.get(language, language)
                texts = {str(place): paragraph(language, page, place) for place in range(PARAGRAPHS)}
                archive.writestr(f"homeassistant/components/a{page}/translations/{code}.json", json.dumps(texts))
        for page in range(7000, 7000 + PAGES):  # each repeats one of the other documents
            repeated = json.dumps({"0": f"{paragraph('es', page - 2000, 0)} and so on"})
            archive.writestr(f"homeassistant/components/b{page}/translations/es.json", repeated)
            archive.writestr(f"homeassistant/components/b{page}/translations/en.json", "{}")


@pytest.fixture(scope="module")
def packages(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    folder = tmp_path_factory.mktemp("packages") / "downloads"
    write_packages(folder)
    return {path.name: path for path in folder.iterdir()}


@pytest.fixture(scope="module")
def folder(packages: dict[str, Path], tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("text")
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(package_text, "SCENE_CHARACTERS", 300)
        write_texts(folder, packages)
    return folder


def read(path: Path) -> list[str]:
    return [json.loads(line)["text"] for line in path.read_text(encoding="utf-8").splitlines()]


def test_held_out_documents_are_the_same_in_every_language_and_in_no_training_text(folder: Path) -> None:
    pages = [page for page in range(5000, 5000 + PAGES) if is_held_out(f"a{page}")]
    for language in (*LANGUAGES, *UNSEEN):
        actual = "\n".join(read(folder / f"interface.{language}.jsonl"))
        assert {page for page in pages if paragraph(language, page, 1) in actual} == {*pages} != set()
    for language in LANGUAGES:
        trained = "\n".join(read(folder / f"train.{language}.jsonl"))
        assert not [page for page in range(5000, 5000 + PAGES) if paragraph(language, page, 1) in trained]


def test_plain_text_has_nothing_that_is_held_out_and_no_code_that_is_measured(folder: Path) -> None:
    assert {path.name.split(".")[1] for path in folder.glob("plain.*.jsonl")} <= {*PLAIN, "code"}
    pairs = [(f"a{page}", f"b{page + 2000}") for page in range(5000, 5000 + PAGES)]
    trained = [name for pair in pairs if not any(map(is_held_out, pair)) for name in pair]
    assert 0 < len(trained) == len(read(folder / "plain.es.jsonl")) < 2 * PAGES
    measured, plain = ({*read(folder / f"{name}.jsonl")} for name in ("code", "plain.code"))
    assert len(measured) == 32 and len(plain) == PAGES - 32 and not measured & plain


def test_pages_lose_markup_repeats_and_what_is_not_translated(folder: Path) -> None:
    places = [(page, place) for page in range(PAGES) for place in range(PARAGRAPHS)]
    for language in LANGUAGES:
        actual = [text for document in read(folder / f"train.{language}.jsonl") for text in document.split("\n")]
        pages = [text for text in actual if text.endswith("&")]
        assert sorted(pages) == sorted(f"{paragraph(language, page, place)} &" for page, place in places)
        assert (UNTRANSLATED in actual) == (language == "en")
        assert not [text for text in actual if "outside" in text or "script" in text or "below" in text]


def test_scenes_are_parallel_and_in_the_order_of_the_game(packages: dict[str, Path]) -> None:
    actual = read_stories(packages)
    assert actual["el"].keys() == actual["en"].keys() and len(actual["en"]) > len(CAMPAIGNS)
    told = [text for name, scene in actual["el"].items() if name.startswith("httt/") for text in scene]
    first = 1000 * (CAMPAIGNS.index("httt") + 1)
    assert told == [paragraph("el", first + page, place) for page in range(12) for place in range(PARAGRAPHS)]


def test_training_text_shares_no_13_gram_with_held_out_text() -> None:
    shared = "one two three four five six seven eight nine ten eleven twelve thirteen"
    documents = {"a": [f"Start {shared} here.", "Something else that is long enough"], "b": [f"{shared} " * 5]}
    grams = {*ngrams(f"And {shared}", "en")}
    assert [*training_text(documents, "en", grams, 1000)] == ["Something else that is long enough"]


def test_ngrams_by_hand() -> None:
    words = [f"w{number}" for number in range(14)]
    expected = [tuple(words[:13]), tuple(words[1:])]
    assert [*ngrams(" ".join(words).upper() + ".", "en")] == expected
    letters = "甲乙丙丁戊己庚辛壬癸子丑寅卯"
    assert [*ngrams(f"{letters[:4]}，{letters[4:]}。", "zh")] == [letters[:13], letters[1:]]


def test_two_builds_have_the_same_bytes(folder, packages, tmp_path, monkeypatch) -> None:
    monkeypatch.setattr(package_text, "SCENE_CHARACTERS", 300)
    write_texts(tmp_path, packages)
    assert files_of(folder) == files_of(tmp_path)


def test_sentences() -> None:
    assert is_sentence("Άνοιξε το παράθυρο της εφαρμογής", "el")
    assert not is_sentence("Open the window of the application", "el")
    for text in ("Open the window of the app", "Pencereyi <b>açmak</b> için buna basın", "Yalnızca dört kısa sözcük"):
        assert not is_sentence(text, "tr")
    assert clean({language: {"a": ["Same in all of the languages"]} for language in LANGUAGES})["hu"] == {}
