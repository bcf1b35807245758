"""FLORES-101 as text to measure on: sentences in 101 languages, translated by people, on which nothing here trains."""

from pathlib import Path

from examples.demo_corpus import write_lines
from moelpr.base.errors import UserError
from moelpr.base.files import atomic_directory
from moelpr.base.languages import canonical

# Its names that are no codes of languages.
CODES = {"zho_simpl": "zh", "zho_trad": "zh-Hant"}


def write_flores(flores: Path, output: Path) -> None:
    """Write the lines with odd numbers as `flores.CODE.jsonl`; those with even ones are for choosing.

    Raises:
        UserError: There is no data set, or its files are not parallel.
    """
    sentences = {file.stem: file.read_text("utf-8").splitlines() for file in sorted(flores.glob("dev/*.dev"))}
    if len({len(lines) for lines in sentences.values()}) != 1:
        what = "files of other lengths" if sentences else "no files"
        raise UserError(f"{flores}/dev has {what} *.dev; pass the folder of FLORES-101, which has dev/eng.dev")
    with atomic_directory(output) as folder:
        for code, lines in sentences.items():
            write_lines(
                folder / f"flores.{canonical(CODES.get(code, code))}.jsonl", ({"text": line} for line in lines[1::2])
            )
