"""Text that makes a second base: plain text of a kind that it is later evaluated on, and never again trained on.

    python -m examples.real_model.plain_text --run runs/plain

Writes RUN/plain-text/NAME.jsonl from the package of the interface texts: documents in the original languages and in
half of the eight unseen ones, and Python code. What is held out is left out, with all that shares an n-gram with it.
"""

import re
import zipfile
from collections.abc import Iterator
from pathlib import Path

from examples.demo_corpus import WHEEL, read_documents, write_lines
from examples.downloads import fetch_all
from examples.languages import ORIGINAL
from examples.real_model.arguments import parse
from examples.real_model.text import as_line, choose_train, grams_of, hash_of, unseen_lines
from moelpr.base.command import run_command
from moelpr.base.files import atomic_directory, refuse_existing

UNSEEN_READ = ("de", "fr", "pl", "fi")  # unseen languages that the second base has read
KIND, TEXT_BYTES = "interface", 200_000  # bytes of a language, and of code
_FILE_CHARACTERS = 2_000


def write_texts(output: Path, wheel: Path) -> None:
    """Write a file for each language, and one of code.

    Args:
        wheel: Home Assistant.
    """
    languages = (*ORIGINAL, *UNSEEN_READ)
    for language, found in read_documents(wheel, languages).items():
        documents = {name: text.split("\n") for name, text in found.items()}
        unseen_grams = set(grams_of(unseen_lines(documents, KIND), language))
        lines, _ = choose_train(documents, KIND, language, unseen_grams, TEXT_BYTES)
        write_lines(output / f"{language}.jsonl", lines)
    write_lines(output / "code.jsonl", [as_line([text], "code", name) for name, text in code(wheel)])


def code(wheel: Path) -> Iterator[tuple[str, str]]:
    """Yield names and starts of Python files, but of none that `unseen` may take."""
    size = 0
    with zipfile.ZipFile(wheel) as archive:
        names = (name for name in archive.namelist() if re.fullmatch(r"homeassistant/components/\w+/\w+\.py", name))
        for name in sorted((name for name in names if not name.endswith("/sensor.py")), key=hash_of):
            if text := archive.read(name).decode()[:_FILE_CHARACTERS].strip():
                yield name, text
                size += len(text.encode())
            if size >= TEXT_BYTES:
                return


def main() -> None:
    args = parse(__doc__.splitlines()[0], downloads=True)
    refuse_existing([args.run / "plain-text"], args.overwrite)
    wheel = fetch_all([WHEEL], args.cache or args.run / "downloads")[WHEEL.package]
    with atomic_directory(args.run / "plain-text") as output:
        write_texts(output, wheel)


if __name__ == "__main__":
    run_command(main)
