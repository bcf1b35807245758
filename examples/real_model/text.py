"""Training and held-out text in six languages: two kinds to train on, one that is never trained on.

    python -m examples.real_model.text --run runs/real-model

A hash of a document's ID decides whether it is held out, in every language. Writes into RUN/corpus, of JSON lines with
the keys text, id and kind:

- `train.<lang>.jsonl`;
- `held-out.<kind>.<lang>.jsonl`, some of the documents held out, for bits per byte;
- `unseen.<lang>.jsonl`, all documents held out, for long English;
- `facts.json`: sources with their licences, sizes, and how much of the held-out text is in the training text.
"""

import hashlib
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import asdict
from pathlib import Path
from typing import Any, ClassVar

from pydantic.dataclasses import dataclass

from examples.demo_corpus import write_lines
from examples.downloads import fetch_all, read_sources, require_space
from examples.languages import LANGUAGES
from examples.real_model.arguments import parse
from examples.real_model.package_text import Documents, read_help, read_interface, read_stories
from moelpr.base.command import run_command
from moelpr.base.files import atomic_directory
from moelpr.base.records import STRICT, Record

Reader = Callable[[Mapping[str, Path]], Documents]
TRAINED: dict[str, Reader] = {"help": read_help, "stories": read_stories}
UNTRAINED: dict[str, Reader] = {"interface": read_interface}
# At most so much of each kind per language: less than LibreOffice's help has in any language, about what the stories
# have in Hungarian.
TRAIN_BYTES = {"help": 700_000, "stories": 400_000}
HELD_OUT_ONE_IN = 6
HELD_OUT_DOCUMENTS = 32  # per kind and language, for bits per byte: evaluation takes minutes, intervals need 30
HELD_OUT_CHARACTERS = (200, 800)  # length of such a document, in Chinese a third
NGRAM = 13
DISK = 100_000_000  # bytes of the corpus and of what is read for it

Lines = list[dict[str, str]]


@dataclass(frozen=True, config=STRICT)
class Facts(Record):
    """The origin and the sizes of the real model's corpus, `facts.json` in its folder.

    Attributes:
        sources: Package -> its version, checksum, size and licence.
        trained: Kinds of text that are trained on.
        untrained: Kinds of text that are never trained on.
        languages: Language -> sizes of its parts, and how much of the held-out text is in the training text.
    """

    FILE_NAME: ClassVar[str] = "facts.json"
    REMEDY: ClassVar[str] = "remove its folder and rerun make results"
    INDENT: ClassVar[int | None] = 1

    sources: dict[str, Any]
    trained: list[str]
    untrained: list[str]
    languages: dict[str, Any]

    @property
    def kinds(self) -> list[str]:
        """All kinds of text, sorted."""
        return sorted((*self.trained, *self.untrained))


def build_corpus(output: Path, cache: Path, *, overwrite: bool = False) -> Facts:
    """Write the corpus unless `output` contains one, and return its facts.

    Args:
        cache: folder of downloads.
        overwrite: Replace an existing corpus.
    """
    if (output / Facts.FILE_NAME).exists() and not overwrite:
        return Facts.read(output)
    require_space(output, DISK, "the text")
    sources = {name: source for name, source in read_sources().items() if source.kind in {**TRAINED, **UNTRAINED}}
    packages = fetch_all(sources.values(), cache)
    documents = {kind: read(packages) for kind, read in {**TRAINED, **UNTRAINED}.items()}
    with atomic_directory(output) as folder:
        facts = Facts(
            sources={name: asdict(source) for name, source in sources.items()},
            trained=[*TRAINED],
            untrained=[*UNTRAINED],
            languages={
                language: write_language(folder, language, {kind: found[language] for kind, found in documents.items()})
                for language in LANGUAGES
            },
        )
        facts.write(folder)
    return facts


def write_language(folder: Path, language: str, documents: Mapping[str, Mapping[str, list[str]]]) -> dict[str, Any]:
    """Write the files of a language, and return their sizes and overlaps.

    Args:
        documents: kind -> document ID -> paragraphs.
    """
    unseen = {kind: unseen_lines(found, kind) for kind, found in documents.items()}
    held_out = {kind: choose_held_out(lines, language) for kind, lines in unseen.items()}
    unseen_grams = {gram for lines in unseen.values() for gram in grams_of(lines, language)}
    train, removed = [], []
    for kind in TRAINED:
        kept, left_out = choose_train(documents[kind], kind, language, unseen_grams, TRAIN_BYTES[kind])
        train += kept
        removed += left_out
    train.sort(key=lambda line: hash_of(line["id"]))
    write_lines(folder / f"train.{language}.jsonl", train)
    write_lines(folder / f"unseen.{language}.jsonl", [line for lines in unseen.values() for line in lines])
    for kind, lines in held_out.items():
        write_lines(folder / f"held-out.{kind}.{language}.jsonl", lines)
    after = set(grams_of(train, language))
    before = after | set(grams_of(removed, language))
    return {
        "train": {kind: sizes([line for line in train if line["kind"] == kind]) for kind in TRAINED},
        "removed_from_train": sizes(removed),
        "held_out": {kind: sizes(lines) for kind, lines in held_out.items()},
        "unseen": {kind: sizes(lines) for kind, lines in unseen.items()},
        # Fraction of the held-out text's 13-grams that are in the training text.
        "overlap_13_grams": {
            kind: {"before_removal": share(lines, language, before), "after": share(lines, language, after)}
            for kind, lines in held_out.items()
        },
    }


def hash_of(name: str) -> int:
    return int.from_bytes(hashlib.sha256(name.encode()).digest())


def is_held_out(document: str) -> bool:
    return hash_of(document) % HELD_OUT_ONE_IN == 0


def unseen_lines(documents: Mapping[str, list[str]], kind: str) -> Lines:
    """The documents that are held out, in an order that is the same for all languages."""
    return [as_line(documents[name], kind, name) for name in sorted(documents, key=hash_of) if is_held_out(name)]


def choose_held_out(lines: Lines, language: str) -> Lines:
    """The first HELD_OUT_DOCUMENTS of suitable length."""
    low, high = (length // 3 if language == "zh" else length for length in HELD_OUT_CHARACTERS)
    return [line for line in lines if low <= len(line["text"]) <= high][:HELD_OUT_DOCUMENTS]


def choose_train(
    documents: Mapping[str, list[str]], kind: str, language: str, unseen_grams: set[Any], most_bytes: int
) -> tuple[Lines, Lines]:
    """`most_bytes` of the other documents, and paragraphs left out because they share an n-gram with unseen text."""
    lines: Lines = []
    removed: Lines = []
    size = 0
    for name in sorted(documents, key=hash_of):
        if is_held_out(name) or size >= most_bytes:
            continue
        shared = [not unseen_grams.isdisjoint(ngrams(text, language)) for text in documents[name]]
        for is_removed, target in ((False, lines), (True, removed)):
            paragraphs = [text for text, found in zip(documents[name], shared, strict=True) if found == is_removed]
            if paragraphs:
                target.append(as_line(paragraphs, kind, name))
                size += 0 if is_removed else len(target[-1]["text"].encode())
    return lines, removed


def as_line(paragraphs: Iterable[str], kind: str, name: str) -> dict[str, str]:
    return {"text": "\n".join(paragraphs), "id": f"{kind}/{name}", "kind": kind}


def ngrams(text: str, language: str) -> Iterator[Any]:
    """Runs of NGRAM words (characters in Chinese) of each paragraph, in lower case and without punctuation."""
    for paragraph in text.lower().split("\n"):
        spaced = "".join(character if character.isalnum() else " " for character in paragraph)
        words: Any = spaced.replace(" ", "") if language == "zh" else tuple(spaced.split())
        for start in range(len(words) - NGRAM + 1):
            yield words[start : start + NGRAM]


def grams_of(lines: Lines, language: str) -> Iterator[Any]:
    return (gram for line in lines for gram in ngrams(line["text"], language))


def share(lines: Lines, language: str, others: set[Any]) -> float:
    """Fraction of the n-grams of `lines` that are among `others`."""
    found = [gram in others for gram in grams_of(lines, language)]
    return sum(found) / max(1, len(found))


def sizes(lines: Lines) -> dict[str, int]:
    texts = [line["text"] for line in lines]
    return {"documents": len(texts), "bytes": sum(len(text.encode()) for text in texts)}


def main() -> None:
    args = parse(__doc__.splitlines()[0], downloads=True)
    facts = build_corpus(args.run / "corpus", args.cache or args.run / "downloads", overwrite=args.overwrite)
    for language, found in facts.languages.items():
        train = sum(kind["bytes"] for kind in found["train"].values())
        held_out = ", ".join(f"{kind} {size['bytes']:,}" for kind, size in found["held_out"].items())
        print(f"{language}: {train:,} bytes to train on; held out: {held_out}")


if __name__ == "__main__":
    run_command(main)
