"""Show a tokenized corpus (sizes, languages, document lengths, documents), and check all of it.

The three files are compared with each other, with the checksum in the .lang, and with the manifest's checksums and
counts. With a tokenizer the documents are shown as text, otherwise as token ids.

    python data_tools/inspect_data.py data/el_text_document --json
"""

import argparse
import dataclasses
import json
import textwrap
from typing import Any

import numpy as np
from numpy.typing import NDArray

from data_tools.corpus import Corpus
from moelpr.data.manifest import Manifest
from moelpr.data.tokenizer import Tokenizer, add_tokenizer_arguments, load_tokenizer
from moelpr.errors import UserError, run_command

# Tokens read at once, so that memory stays small whatever the corpus.
_CHUNK_TOKENS = 1 << 24
_BAR = 40  # characters of the histogram's longest bar


def main(argv: list[str] | None = None) -> None:
    arguments = parse_arguments(argv)
    corpus = Corpus(arguments.prefix)
    manifest = corpus.verify()
    summary = summarize(corpus, manifest)
    tokenizer = None
    if arguments.tokenizer_type:
        tokenizer = load_tokenizer(arguments.tokenizer_type, arguments.tokenizer_model)
        if summary["largest_id"] >= tokenizer.vocab_size:
            raise UserError(
                f"{corpus.paths.bin} holds token id {summary['largest_id']:,} but {arguments.tokenizer_model} ends at "
                f"{tokenizer.vocab_size - 1:,}; give the tokenizer that the corpus was made with"
            )
    shown = [
        show_document(corpus, index, tokenizer, arguments.characters)
        for index in range(min(arguments.documents, corpus.num_documents))
    ]
    if arguments.json:
        print(json.dumps(summary | {"shown": shown}, ensure_ascii=False, indent=2))
        return
    print_summary(summary)
    for number, document in enumerate(shown, start=1):
        print_document(document, number, corpus.num_documents)
    print(f"\nThe files agree: {', '.join(summary['verified'])}.")


def parse_arguments(argv: list[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("prefix", metavar="PREFIX", help="the corpus's path without .bin, .idx or .lang")
    parser.add_argument("--documents", type=int, default=3, help="documents to show (default: 3)")
    parser.add_argument("--characters", type=int, default=400, help="characters to show of each run (default: 400)")
    parser.add_argument("--json", action="store_true", help="print one JSON object instead of text")
    parser.add_argument("--debug", action="store_true", help="show the traceback of an error")
    add_tokenizer_arguments(parser, required=False)
    arguments = parser.parse_args(argv)
    if bool(arguments.tokenizer_type) != bool(arguments.tokenizer_model):
        raise UserError("--tokenizer-type and --tokenizer-model go together; give both or neither")
    for name in ("documents", "characters"):
        if getattr(arguments, name) < 0:
            raise UserError(f"--{name} {getattr(arguments, name)} must be at least 0")
    for name in (".bin", ".idx", ".lang", ".manifest.json"):
        arguments.prefix = arguments.prefix.removesuffix(name)
    return arguments


def chunks(tokens: NDArray[np.number]) -> list[NDArray[np.number]]:
    return [tokens[start : start + _CHUNK_TOKENS] for start in range(0, len(tokens), _CHUNK_TOKENS)]


def summarize(corpus: Corpus, manifest: Manifest | None) -> dict[str, Any]:
    """What --json prints, without the documents shown."""
    lengths = corpus.document_lengths
    num_tokens, num_original = corpus.bits.num_tokens, corpus.bits.num_original
    return {
        "prefix": corpus.prefix,
        "files": {path.suffix[1:]: path.stat().st_size for path in corpus.paths},
        "dtype": corpus.tokens.dtype.name,
        "largest_id": max((int(chunk.max()) for chunk in chunks(corpus.tokens)), default=-1),
        "sequences": len(corpus.sequence_lengths),
        "documents": corpus.num_documents,
        "empty_documents": int((lengths == 0).sum()),
        "tokens": num_tokens,
        "original_tokens": num_original,
        "expanded_tokens": num_tokens - num_original,
        "tokens_per_document": length_statistics(lengths),
        "length_histogram": length_histogram(lengths),
        "manifest": manifest and dataclasses.asdict(manifest),
        "verified": ["sizes", "offsets", "token count", "checksum of the .lang"]
        + (["checksums of all files", "counts per language"] if manifest else []),
    }


def length_statistics(lengths: NDArray[np.int64]) -> dict[str, float]:
    """Tokens per document; nothing for a corpus without documents."""
    if not len(lengths):
        return {}
    return {
        "shortest": int(lengths.min()),
        "median": float(np.median(lengths)),
        "mean": float(lengths.mean()),
        "percentile_95": float(np.percentile(lengths, 95)),
        "longest": int(lengths.max()),
    }


def length_histogram(lengths: NDArray[np.int64]) -> list[dict[str, int]]:
    """Documents and their tokens by length, from one power of two up to the next; empty documents are left out."""
    lengths = lengths[lengths > 0]
    if not len(lengths):
        return []
    exponents = np.frexp(lengths.astype(np.float64))[1] - 1  # exact, unlike a logarithm
    documents = np.bincount(exponents)
    tokens = np.bincount(exponents, weights=lengths).astype(np.int64)
    return [
        {"from": 1 << power, "to": (2 << power) - 1, "documents": int(documents[power]), "tokens": int(tokens[power])}
        for power in range(int(exponents.min()), len(documents))
    ]


def show_document(corpus: Corpus, index: int, tokenizer: Tokenizer | None, characters: int) -> dict[str, Any]:
    """A document's runs of one language bit, each with its first characters."""
    ids, bits = corpus.document(index)
    shown = []
    for start, stop in runs(bits):
        # A character takes one token or more in print: no need to decode a whole book for its first lines.
        first = ids[start : min(stop, start + characters)].tolist()
        text = tokenizer.decode(first) if tokenizer else " ".join(map(str, first))
        shown.append(
            {
                "bit": "original" if bits[start] else "expanded",
                "from": start + 1,
                "to": stop,
                "text": text[:characters],
                "is_cut": len(text) > characters or len(first) < stop - start,
            }
        )
    return {"tokens": len(ids), "runs": shown}


def runs(bits: NDArray[np.uint8]) -> list[tuple[int, int]]:
    """The ranges [start, stop) of equal bits."""
    borders = np.flatnonzero(np.diff(bits)) + 1
    edges = [0, *borders.tolist(), len(bits)]
    return [(start, stop) for start, stop in zip(edges[:-1], edges[1:], strict=True) if stop > start]


def print_summary(summary: dict[str, Any]) -> None:
    contents = {
        "bin": f"{summary['dtype']} token ids, the largest {summary['largest_id']:,}",
        "idx": f"{summary['sequences']:,} sequences",
        "lang": "language bits",
    }
    print(summary["prefix"])
    for name, content in contents.items():
        print(f"  .{name:<5}{size(summary['files'][name]):>10}   {content}")
    manifest, num_tokens, empty = summary["manifest"], summary["tokens"], summary["empty_documents"]
    if manifest:
        tokenizer = manifest["tokenizer"]
        end = f", ended by token {tokenizer['eod_id']}" if manifest["append_eod"] else ""
        sources = f"{len(manifest['sources']):,} source{'' if len(manifest['sources']) == 1 else 's'}"
        print(f"  made with {tokenizer['type']} {tokenizer['model']}{end}, from {sources}")
    else:
        print("  no manifest: the token ids themselves can't be checked, nor which tokenizer made them")
    print()
    print(f"  {'documents':<20}{summary['documents']:>15,}" + (f"   {empty:,} empty" if empty else ""))
    print(f"  {'tokens':<20}{num_tokens:>15,}")
    for bit in ("original", "expanded"):
        count = summary[f"{bit}_tokens"]
        print(f"    {bit + '-language':<18}{count:>15,}   {count / max(num_tokens, 1):6.1%}")
    if manifest and manifest["languages"]:
        print_languages(manifest["languages"], num_tokens)
    if summary["tokens_per_document"]:
        print("\n  tokens per document")
        for name, value in summary["tokens_per_document"].items():
            print(f"    {'95 of 100 up to' if name == 'percentile_95' else name:<18}{value:>15,.0f}")
    print_histogram(summary["length_histogram"])


def print_languages(languages: dict[str, dict[str, Any]], num_tokens: int) -> None:
    print(f"\n  {'language':<16}{'bit':<10}{'documents':>15}{'tokens':>18}{'share':>9}{'bytes/token':>13}")
    for name, count in sorted(languages.items(), key=lambda item: (item[1]["bit"] != "original", item[0])):
        # After a draw the text's bytes are not known.
        density = f"{count['bytes'] / count['tokens']:.2f}" if count["tokens"] and count["bytes"] else "–"
        share = count["tokens"] / max(num_tokens, 1)
        print(
            f"  {name:<16}{count['bit']:<10}{count['documents']:>15,}{count['tokens']:>18,}{share:>9.1%}{density:>13}"
        )


def print_histogram(histogram: list[dict[str, int]]) -> None:
    if not histogram:
        return
    most = max(part["documents"] for part in histogram)
    print(f"\n  {'tokens':<27}{'documents':>13}{'tokens':>18}")
    for part in histogram:
        bar = "█" * -(-_BAR * part["documents"] // most)  # rounded up: what is there is seen
        span = f"{part['from']:,} to {part['to']:,}"
        print(f"    {span:<25}{part['documents']:>13,}{part['tokens']:>18,}  {bar}".rstrip())


def print_document(document: dict[str, Any], number: int, num_documents: int) -> None:
    tokens = document["tokens"]
    print(f"\ndocument {number:,} of {num_documents:,}, {tokens:,} token{'' if tokens == 1 else 's'}")
    for run in document["runs"]:
        label = f"  [{run['bit']} {run['from']:,}–{run['to']:,}] "
        text = run["text"] + (" …" if run["is_cut"] else "")
        # Control characters and line breaks would break the picture; show them escaped.
        text = "".join(char if char.isprintable() else char.encode("unicode_escape").decode() for char in text)
        print(textwrap.fill(label + text, width=110, subsequent_indent="    ", break_on_hyphens=False))


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
