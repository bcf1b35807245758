"""Show a tokenized corpus: sizes, languages, document lengths, first documents; and check its three files.

With a tokenizer the documents are shown as text, otherwise as token ids.
"""

import argparse
import textwrap

import numpy as np
from numpy.typing import NDArray

from data_tools.corpus import Corpus
from moelpr.data.tokenizer import Tokenizer, add_tokenizer_arguments, load_tokenizer
from moelpr.errors import UserError, run_command

# Tokens read at once, so that memory stays small whatever the corpus.
_CHUNK_TOKENS = 1 << 24


def main(argv: list[str] | None = None) -> None:
    arguments = parse_arguments(argv)
    corpus = Corpus(arguments.prefix)
    corpus.bits.verify()
    largest_id = max((int(chunk.max()) for chunk in chunks(corpus.tokens)), default=-1)
    tokenizer = None
    if arguments.tokenizer_type:
        tokenizer = load_tokenizer(arguments.tokenizer_type, arguments.tokenizer_model)
        if largest_id >= tokenizer.vocab_size:
            raise UserError(
                f"{corpus.paths.bin} holds token id {largest_id:,} but {arguments.tokenizer_model} ends at "
                f"{tokenizer.vocab_size - 1:,}; give the tokenizer that the corpus was made with"
            )
    print_summary(corpus, largest_id)
    for index in range(min(arguments.documents, corpus.num_documents)):
        print_document(corpus, index, tokenizer, arguments.characters)
    print("\nThe three files agree: sizes, offsets, token count, checksum.")


def parse_arguments(argv: list[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("prefix", metavar="PREFIX", help="the corpus's path without .bin, .idx or .lang")
    parser.add_argument("--documents", type=int, default=3, help="documents to show (default: 3)")
    parser.add_argument("--characters", type=int, default=400, help="characters to show of each run (default: 400)")
    parser.add_argument("--debug", action="store_true", help="show the traceback of an error")
    add_tokenizer_arguments(parser, required=False)
    arguments = parser.parse_args(argv)
    if bool(arguments.tokenizer_type) != bool(arguments.tokenizer_model):
        raise UserError("--tokenizer-type and --tokenizer-model go together; give both or neither")
    for name in (".bin", ".idx", ".lang"):
        arguments.prefix = arguments.prefix.removesuffix(name)
    return arguments


def chunks(tokens: NDArray[np.number]) -> list[NDArray[np.number]]:
    return [tokens[start : start + _CHUNK_TOKENS] for start in range(0, len(tokens), _CHUNK_TOKENS)]


def print_summary(corpus: Corpus, largest_id: int) -> None:
    lengths = corpus.document_lengths
    num_tokens, num_original = corpus.bits.num_tokens, corpus.bits.num_original
    num_empty = int((lengths == 0).sum())
    contents = {
        corpus.paths.bin: f"{corpus.tokens.dtype.name} token ids, the largest {largest_id:,}",
        corpus.paths.idx: f"{len(corpus.sequence_lengths):,} sequences",
        corpus.paths.lang: "language bits",
    }
    print(corpus.prefix)
    for path, content in contents.items():
        print(f"  {path.suffix:<6}{size(path.stat().st_size):>10}   {content}")
    print()
    print(f"  {'documents':<20}{corpus.num_documents:>15,}" + (f"   {num_empty:,} empty" if num_empty else ""))
    print(f"  {'tokens':<20}{num_tokens:>15,}")
    for name, count in (("original-language", num_original), ("expanded-language", num_tokens - num_original)):
        print(f"    {name:<18}{count:>15,}   {count / max(num_tokens, 1):6.1%}")
    if corpus.num_documents:
        print("  tokens per document")
        for name, value in (
            ("shortest", lengths.min()),
            ("median", np.median(lengths)),
            ("mean", lengths.mean()),
            ("95 of 100 up to", np.percentile(lengths, 95)),
            ("longest", lengths.max()),
        ):
            print(f"    {name:<18}{value:>15,.0f}")


def print_document(corpus: Corpus, index: int, tokenizer: Tokenizer | None, characters: int) -> None:
    ids, bits = corpus.document(index)
    print(f"\ndocument {index + 1:,} of {corpus.num_documents:,}, {len(ids):,} token{'' if len(ids) == 1 else 's'}")
    for start, stop in runs(bits):
        label = f"  [{'original' if bits[start] else 'expanded'} {start + 1:,}–{stop:,}] "
        # A character takes one token or more in print: no need to decode a whole book for its first lines.
        shown = ids[start : min(stop, start + characters)].tolist()
        text = tokenizer.decode(shown) if tokenizer else " ".join(map(str, shown))
        cut = len(text) > characters or len(shown) < stop - start
        text = text[:characters] + (" …" if cut else "")
        # Control characters and line breaks would break the picture; show them escaped.
        text = "".join(char if char.isprintable() else char.encode("unicode_escape").decode() for char in text)
        print(textwrap.fill(label + text, width=110, subsequent_indent="    ", break_on_hyphens=False))


def runs(bits: NDArray[np.uint8]) -> list[tuple[int, int]]:
    """The ranges [start, stop) of equal bits."""
    borders = np.flatnonzero(np.diff(bits)) + 1
    edges = [0, *borders.tolist(), len(bits)]
    return [(start, stop) for start, stop in zip(edges[:-1], edges[1:], strict=True) if stop > start]


def size(num_bytes: int) -> str:
    """Bytes for a person, in powers of 1000."""
    value = float(num_bytes)
    for unit in ("B", "kB", "MB", "GB"):
        if value < 1000:
            return f"{value:,.0f} {unit}" if unit == "B" else f"{value:,.1f} {unit}"
        value /= 1000
    return f"{value:,.1f} TB"


if __name__ == "__main__":
    run_command(main)
