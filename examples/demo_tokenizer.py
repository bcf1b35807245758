"""Train the demo's tokenizer: byte-level BPE with Qwen2's rules, saved so that `AutoTokenizer` loads it."""

from itertools import chain
from pathlib import Path

from moelpr.base.command import CommandParser, run_command
from moelpr.base.errors import UserError
from moelpr.base.files import atomic_directory, refuse_existing
from moelpr.data.text.reading import read_documents

_SMALLEST_VOCABULARY = 257  # the 256 bytes and <|endoftext|>


def train_demo_tokenizer(inputs: list[Path], output: Path, vocab_size: int, *, overwrite: bool = False) -> None:
    """Train a Qwen2 tokenizer on the `text` of JSON lines files and write it to the folder `output`.

    The same files give the same tokenizer. `vocab_size` is the number of IDs: 256 bytes, merges and `<|endoftext|>`
    (end of a document and padding).

    Raises:
        UserError: An input is missing, malformed or too small for the vocabulary, or `output` already exists.
    """
    # transformers takes seconds to import; --help should not.
    from transformers import Qwen2Tokenizer

    if vocab_size < _SMALLEST_VOCABULARY:
        raise UserError(f"--vocab-size must be at least {_SMALLEST_VOCABULARY}, got {vocab_size}")
    refuse_existing([output], overwrite)
    texts = chain.from_iterable(map(read_documents, inputs))
    tokenizer = Qwen2Tokenizer().train_new_from_iterator(texts, vocab_size, show_progress=False)
    if len(tokenizer) != vocab_size:
        raise UserError(
            f"the texts give a vocabulary of only {len(tokenizer):,} entries, but --vocab-size is {vocab_size:,}; "
            "add text or lower --vocab-size"
        )
    with atomic_directory(output) as folder:
        tokenizer.save_pretrained(folder)


def main() -> None:
    parser = CommandParser(description="Train the demo's byte-level BPE tokenizer (Qwen2's rules) on JSON lines.")
    parser.add_argument("--input", type=Path, nargs="+", required=True, metavar="FILE", help='JSON lines with "text"')
    parser.add_argument("--output", type=Path, required=True, metavar="DIR", help="folder for the tokenizer")
    entries = "entries, including special tokens (default: 8192)"
    parser.add_argument("--vocab-size", type=int, default=8192, metavar="N", help=entries)
    parser.add_argument("--overwrite", action="store_true", help="replace an existing output")
    args = parser.parse_args()
    train_demo_tokenizer(args.input, args.output, args.vocab_size, overwrite=args.overwrite)


if __name__ == "__main__":
    run_command(main)
