"""FLORES-101 as text to measure on: sentences that people translated into 101 languages, of which nothing here trains.

    python -m examples.experiments.flores --flores flores101_dataset --output runs/experiments/flores

Writes one `flores.CODE.jsonl` per language, with the key text. `--flores` is the folder of the data set as it is
published, with `dev/eng.dev` and so on. Lines with odd numbers are written, those with even ones are for choosing.
"""

from pathlib import Path

from examples.demo_corpus import write_lines
from moelpr.base.command import CommandParser, run_command
from moelpr.base.errors import UserError
from moelpr.base.files import atomic_directory, refuse_existing
from moelpr.base.languages import canonical

# Its names that are no codes of languages.
CODES = {"zho_simpl": "zh", "zho_trad": "zh-Hant"}


def write_flores(flores: Path, output: Path) -> None:
    """Write the lines to report.

    Raises:
        UserError: There is no data set, or its files are not parallel.
    """
    files = sorted(flores.glob("dev/*.dev"))
    sentences = {file.stem: file.read_text(encoding="utf-8").splitlines() for file in files}
    lengths = {len(lines) for lines in sentences.values()}
    if len(lengths) != 1:
        what = "files of other lengths" if lengths else "no files"
        raise UserError(f"{flores}/dev has {what} *.dev; pass the folder of FLORES-101, which has dev/eng.dev")
    with atomic_directory(output) as folder:
        for code, lines in sentences.items():
            write_lines(
                folder / f"flores.{canonical(CODES.get(code, code))}.jsonl", ({"text": line} for line in lines[1::2])
            )


def main() -> None:
    parser = CommandParser(description=__doc__.splitlines()[0])
    add = parser.add_argument
    add("--flores", type=Path, required=True, metavar="DIR", help="folder of the data set, with dev/eng.dev")
    add("--output", type=Path, required=True, metavar="DIR", help="folder to write")
    add("--overwrite", action="store_true", help="replace an existing folder")
    args = parser.parse_args()
    refuse_existing([args.output], args.overwrite)
    write_flores(args.flores, args.output)


if __name__ == "__main__":
    run_command(main)
