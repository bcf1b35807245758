"""Documents in six languages from packages: kind -> language -> document ID -> paragraphs.

A document has the same ID in every language. A paragraph is a sentence or more (5 words, in Chinese 8 characters), has
no markup, occurs once per kind and language, and is not English that nobody has translated.
"""

import gettext
import html
import io
import re
from collections.abc import Iterable, Mapping
from html.parser import HTMLParser
from pathlib import Path, PurePosixPath

from examples import demo_corpus
from examples.debian_package import read_deb
from examples.demo_corpus import Documents
from examples.languages import LANGUAGES

MIN_WORDS, MIN_CHARACTERS_ZH = 5, 8
SCENE_CHARACTERS = 800  # a document of a story has at least so many in English
CAMPAIGNS = ("utbs", "httt", "dm", "dw")
HELP_CODES = {"en": "en-US", "zh": "zh-CN"}  # if LibreOffice's code is not the language's name
GETTEXT_CODES = {"zh": "zh_CN"}
MARKUP = re.compile(r"[<>{}|$\\]|\*\*|`|%[sd(]|\bhttps?:")
ENGLISH_WORDS = {"the", "of", "and", "with", "this", "from", "that"}  # no other language has two of them
BLOCKS = ("p", "h1", "h2", "h3", "h4", "h5", "h6", "li", "td", "th", "dt", "dd")


def read_help(packages: Mapping[str, Path], languages: Iterable[str]) -> Documents:
    """LibreOffice's help: one page is one document."""
    documents: Documents = {}
    for language in languages:
        code = HELP_CODES.get(language, language)
        prefix = f"usr/share/libreoffice/help/{code}/text/"
        pages = read_deb(packages[f"libreoffice-help-{code.lower()}"], prefix, ".html")
        documents[language] = {
            name[len(prefix) : -5]: _HelpPage(page.decode()).paragraphs for name, page in pages.items()
        }
    return clean(documents)


def read_stories(packages: Mapping[str, Path]) -> Documents:
    """Campaigns of the game Battle for Wesnoth: what is told and said in a scene is one document.

    Source files hold the English text in the order of the game, catalogs its translations.
    """
    documents: Documents = {language: {} for language in LANGUAGES}
    for campaign in CAMPAIGNS:
        files = read_deb(packages[f"wesnoth-1.18-{campaign}"], "usr/share/games/wesnoth/1.18/", (".cfg", ".mo"))
        catalogs = {
            language: gettext.GNUTranslations(
                io.BytesIO(files[f"usr/share/games/wesnoth/1.18/locale/{code}/LC_MESSAGES/wesnoth-{campaign}.mo"])
            )
            for language in LANGUAGES[1:]
            for code in [GETTEXT_CODES.get(language, language)]
        }
        for name in sorted(name for name in files if name.endswith(".cfg")):
            for number, scene in enumerate(_scenes(files[name].decode())):
                document = f"{campaign}/{PurePosixPath(name).stem}/{number}"
                documents["en"][document] = [_plain(text) for text in scene]
                for language, catalog in catalogs.items():
                    documents[language][document] = [_plain(catalog.gettext(text)) for text in scene]
    return clean(documents)


def clean(documents: Documents) -> Documents:
    return demo_corpus.keep_sentences(documents, is_sentence)


def is_sentence(text: str, language: str) -> bool:
    """Whether a text is long enough, is in the language's script, and has no markup or placeholder."""
    is_long = len(text) >= MIN_CHARACTERS_ZH if language == "zh" else len(text.split()) >= MIN_WORDS
    letters = [character for character in text if character.isalpha()]
    script = {"el": ("\u0370", "\u1fff"), "zh": ("\u2e80", "\U0003ffff")}.get(language, ("A", "\u024f"))
    in_script = sum(script[0] <= character <= script[1] for character in letters)
    is_english = language != "en" and len(ENGLISH_WORDS & set(text.lower().split())) > 1
    return is_long and not is_english and in_script > 0.6 * len(letters) > 0 and not MARKUP.search(text)


class _HelpPage(HTMLParser):
    """Paragraphs inside the part of a page that is shown."""

    def __init__(self, page: str) -> None:
        super().__init__()
        self.paragraphs: list[str] = []
        self._open: list[str] | None = None
        self._is_body = False
        self.feed(page)

    def handle_starttag(self, tag: str, attributes: list[tuple[str, str | None]]) -> None:
        values = dict(attributes)
        if values.get("id") in ("DisplayArea", "DonationFrame"):
            self._is_body = values["id"] == "DisplayArea"
        elif tag in BLOCKS:
            self._close()
            self._open = []
        elif tag == "br" and self._open is not None:
            self._open.append(" ")

    def handle_endtag(self, tag: str) -> None:
        if tag in BLOCKS or tag == "noscript":
            self._close()
        if tag == "noscript":  # shown on every page by a browser without scripts
            self.paragraphs.clear()

    def handle_data(self, data: str) -> None:
        if self._is_body and self._open is not None:
            self._open.append(data)

    def _close(self) -> None:
        if text := " ".join("".join(self._open or []).split()):
            self.paragraphs.append(text)
        self._open = None


def _scenes(source: str) -> Iterable[list[str]]:
    """Translatable texts of a source file, in order, in groups of SCENE_CHARACTERS."""
    scene: list[str] = []
    for match in re.finditer(r'(?<!\w)_\s*"((?:[^"]|"")*)"', source):
        scene.append(match[1].replace('""', '"'))
        if sum(map(len, scene)) >= SCENE_CHARACTERS:
            yield scene
            scene = []
    if scene:
        yield scene


def _plain(text: str) -> str:
    """A message without the context before "^", tags and line breaks."""
    text = re.sub(r"^\w+\^", "", text)
    return " ".join(html.unescape(re.sub(r"</?\w[^<>]*>", "", text)).split())
