"""Text of the experiments: to train on, to make the second base of, and held out.

    python -m examples.experiments.text --output runs/experiments/text

Writes JSON lines with the key text:

- `train.LANG.jsonl`: LibreOffice's help, in three more languages than the six, and stories of a game;
- `interface.LANG.jsonl` and `code.jsonl`, to evaluate on: interface texts of Home Assistant in these and eight unseen
  languages, the same documents in each; Python code;
- `plain.NAME.jsonl`, which the second base reads: other interface texts, in the original languages and half of the
  unseen ones, and other code.

A hash of a document's ID decides whether it is held out, in every language. No training text has a paragraph that
shares 13 words with a held-out document.
"""

import random
import re
import zipfile
from collections.abc import Iterable, Iterator, Mapping
from pathlib import Path
from typing import Any

from examples.demo_corpus import WHEEL, Documents, hash_of, output_arguments, read_documents, write_lines
from examples.downloads import fetch_all, read_sources
from examples.experiments.package_text import read_help, read_stories
from examples.languages import LANGUAGES, ORIGINAL
from moelpr.base.command import run_command
from moelpr.base.files import atomic_directory, refuse_existing

UNSEEN = ("de", "fr", "pt", "ru", "ja", "pl", "fi", "ko")  # languages that no training and no kept text has
NEAR = ("nl", "cs", "et")  # relatives of what the second base reads
PLAIN = (*ORIGINAL, "de", "fr", "pl", "fi")  # languages that the second base reads
HELP_BYTES, STORY_BYTES, PLAIN_BYTES = 700_000, 400_000, 200_000  # per language, at most
HELD_OUT_ONE_IN, HELD_OUT_DOCUMENTS = 6, 32
HELD_OUT_CHARACTERS = (200, 1200)  # length in English
CODE_CHARACTERS = 2_000
NGRAM = 13


def write_texts(folder: Path, packages: Mapping[str, Path]) -> None:
    """Write all files; `packages` are paths by name."""
    wheel = packages[WHEEL.package]
    interface = {
        language: {name: text.split("\n") for name, text in held.items()}
        for language, held in read_documents(wheel, (*LANGUAGES, *UNSEEN)).items()
    }
    pages, stories = read_help(packages, (*LANGUAGES, *NEAR)), read_stories(packages)
    names = held_out_names(interface)
    for language, documents in interface.items():
        write(folder, f"interface.{language}", ["\n".join(documents[name]) for name in names])
        held_out = [text for name, texts in documents.items() if is_held_out(name) for text in texts]
        grams = {gram for text in held_out for gram in ngrams(text, language)}
        if language in LANGUAGES:
            lines = [
                *training_text(pages[language], language, grams, HELP_BYTES),
                *training_text(stories[language], language, grams, STORY_BYTES),
            ]
            random.Random(0).shuffle(lines)
            write(folder, f"train.{language}", lines)
        if language in PLAIN:
            others = {name: texts for name, texts in documents.items() if not is_held_out(name)}
            write(folder, f"plain.{language}", training_text(others, language, grams, PLAIN_BYTES))
    for language in NEAR:
        write(folder, f"train.{language}", training_text(pages[language], language, set(), HELP_BYTES))
    code = [*read_code(wheel)]
    write(folder, "code", code[:HELD_OUT_DOCUMENTS])
    write(folder, "plain.code", code[HELD_OUT_DOCUMENTS : HELD_OUT_DOCUMENTS + PLAIN_BYTES // CODE_CHARACTERS])


def write(folder: Path, name: str, texts: Iterable[str]) -> None:
    write_lines(folder / f"{name}.jsonl", [{"text": text} for text in texts])


def is_held_out(name: str) -> bool:
    return hash_of(name) % HELD_OUT_ONE_IN == 0


def held_out_names(documents: Documents) -> list[str]:
    """Return held-out documents that all languages have, in an order that does not depend on their content."""
    shared = set.intersection(*({*names} for names in documents.values()))
    low, high = HELD_OUT_CHARACTERS
    suitable = [x for x in shared if is_held_out(x) and low <= sum(map(len, documents["en"][x])) <= high]
    return sorted(suitable, key=hash_of)[:HELD_OUT_DOCUMENTS]


def training_text(
    documents: Mapping[str, list[str]], language: str, held_out: set[Any], most_bytes: int
) -> Iterator[str]:
    """Yield `most_bytes` of the documents, without paragraphs that share an n-gram with held-out text."""
    size = 0
    for name in sorted(documents, key=hash_of):
        kept = [text for text in documents[name] if held_out.isdisjoint(ngrams(text, language))]
        if kept and size < most_bytes:
            yield "\n".join(kept)
            size += len("\n".join(kept).encode())


def ngrams(text: str, language: str) -> Iterator[Any]:
    """Yield runs of NGRAM words (characters in Chinese), in lower case and without punctuation."""
    spaced = "".join(character if character.isalnum() else " " for character in text.lower())
    words: Any = spaced.replace(" ", "") if language == "zh" else tuple(spaced.split())
    for start in range(len(words) - NGRAM + 1):
        yield words[start : start + NGRAM]


def read_code(wheel: Path) -> Iterator[str]:
    """Yield the starts of Python files, in the order of their names' hashes."""
    with zipfile.ZipFile(wheel) as archive:
        names = (name for name in archive.namelist() if re.fullmatch(r"homeassistant/components/\w+/\w+\.py", name))
        for name in sorted(names, key=hash_of):
            if text := archive.read(name).decode()[:CODE_CHARACTERS].strip():
                yield text


def main() -> None:
    args = output_arguments(__doc__, "folder to make")
    refuse_existing([args.output], args.overwrite)
    sources = [source for source in read_sources().values() if source.kind in ("help", "stories", "interface")]
    packages = fetch_all(sources, args.cache.expanduser())
    with atomic_directory(args.output) as folder:
        write_texts(folder, packages)


if __name__ == "__main__":
    run_command(main)
