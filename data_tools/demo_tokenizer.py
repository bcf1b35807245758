"""Train the demo's tokenizer: byte-level BPE as Qwen2 has it, saved so that `AutoTokenizer` loads it."""

import argparse
import json
from collections.abc import Iterator
from pathlib import Path

from moelpr.errors import UserError, run_command
from moelpr.files import atomic_directory, refuse_existing

_SMALLEST_VOCABULARY = 257  # the 256 bytes and <|endoftext|>


def train_demo_tokenizer(inputs: list[Path], output: Path, vocab_size: int, *, overwrite: bool = False) -> None:
    """Train a Qwen2 tokenizer on the `text` of JSON-lines files and write it to the folder `output`.

    `vocab_size` counts every id: 256 bytes, merges and `<|endoftext|>` (end of a document and padding). The same
    inputs give the same files.

    Raises:
        UserError: an input is missing, malformed or too small for that vocabulary, or `output` exists already.
    """
    # transformers takes seconds to import; --help should not.
    from transformers import Qwen2Tokenizer

    if vocab_size < _SMALLEST_VOCABULARY:
        raise UserError(f"a byte-level vocabulary needs at least {_SMALLEST_VOCABULARY} entries, got {vocab_size}")
    refuse_existing([output], overwrite)
    tokenizer = Qwen2Tokenizer().train_new_from_iterator(_texts(inputs), vocab_size, show_progress=False)
    if len(tokenizer) != vocab_size:
        raise UserError(
            f"the texts give a vocabulary of {len(tokenizer):,} entries and {vocab_size:,} are wanted; "
            "add text or ask for a smaller vocabulary"
        )
    with atomic_directory(output) as folder:
        tokenizer.save_pretrained(folder)


def _texts(inputs: list[Path]) -> Iterator[str]:
    for path in inputs:
        try:
            with open(path, encoding="utf-8") as file:
                for number, line in enumerate(file, start=1):
                    yield _text_of(line, f"{path}, line {number}")
        except FileNotFoundError:
            raise UserError(f"there is no file {path}; build the corpus with data_tools/demo_corpus.py") from None
        except UnicodeDecodeError as error:
            raise UserError(f"{path} is not UTF-8 ({error.reason} at byte {error.start}); convert it") from None


def _text_of(line: str, where: str) -> str:
    try:
        text = json.loads(line)["text"]
    except (ValueError, KeyError, TypeError):
        raise UserError(f'{where}: expected a JSON object with the key "text"') from None
    if not isinstance(text, str):
        raise UserError(f'{where}: "text" must be a string, found {type(text).__name__}')
    return text


def main() -> None:
    parser = argparse.ArgumentParser(
        description="Train the demo's byte-level BPE tokenizer (Qwen2's rules) on JSON lines.",
        formatter_class=argparse.ArgumentDefaultsHelpFormatter,
    )
    parser.add_argument("--input", type=Path, nargs="+", required=True, metavar="FILE", help='JSON lines with "text"')
    parser.add_argument("--output", type=Path, required=True, metavar="DIR", help="folder for the tokenizer")
    parser.add_argument(
        "--vocab-size", type=int, default=8192, metavar="N", help="entries, bytes and specials included"
    )
    parser.add_argument("--overwrite", action="store_true", help="replace an output that exists already")
    parser.add_argument("--debug", action="store_true", help="show a traceback for every error")
    args = parser.parse_args()
    train_demo_tokenizer(args.input, args.output, args.vocab_size, overwrite=args.overwrite)


if __name__ == "__main__":
    run_command(main)
