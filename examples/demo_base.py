"""Make the demo's base before its training: a byte-level BPE tokenizer and a Qwen2 with random weights."""

from itertools import chain
from pathlib import Path

from moelpr.base.command import CommandParser, run_command
from moelpr.base.files import refuse_existing
from moelpr.data.text.reading import read_documents
from moelpr.project.toy import save_model, untrained_qwen2

SHAPE = {"hidden_size": 256, "num_hidden_layers": 6, "intermediate_size": 768}
VOCABULARY = 4096


def make_base(inputs: list[Path], save: Path, vocabulary: int = VOCABULARY) -> None:
    """Train a tokenizer with Qwen2's rules on the `text` of JSON lines files, and write it and a model to a folder."""
    from transformers import Qwen2Tokenizer

    texts = chain.from_iterable(map(read_documents, inputs))
    tokenizer = Qwen2Tokenizer().train_new_from_iterator(texts, vocabulary, show_progress=False)
    save_model(untrained_qwen2(tokenizer, **SHAPE), tokenizer, save)


def main() -> None:
    parser = CommandParser(description=__doc__)
    parser.add_argument("--input", type=Path, nargs="+", required=True, metavar="FILE", help='JSON lines with "text"')
    parser.add_argument("--save", type=Path, required=True, metavar="DIR", help="folder to write")
    parser.add_argument("--overwrite", action="store_true", help="replace an existing folder")
    args = parser.parse_args()
    refuse_existing([args.save], args.overwrite)
    make_base(args.input, args.save)


if __name__ == "__main__":
    run_command(main)
