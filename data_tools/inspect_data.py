"""Show a tokenized corpus (sizes, languages, document lengths, documents) and verify it.

The three files are compared with each other, with the checksum in the .lang, and with the checksums and counts of the
manifest. Documents are shown as text if a tokenizer is given, otherwise as token IDs.

    moelpr data inspect data/el_text_document --json
"""

import json
import textwrap
from typing import Annotated, Any, Literal

import numpy as np

from data_tools.corpus.corpus import Corpus
from data_tools.corpus.tokenized import run_edges
from moelpr.base.errors import UserError, printable, reports_panics
from moelpr.base.machine import format_bytes
from moelpr.base.settings import POSITIONAL, Flags, Natural, run_script
from moelpr.base.text_tables import table_text
from moelpr.data.manifest import Manifest
from moelpr.data.tokenizers.base import Tokenizer
from moelpr.data.tokenizers.loading import load_tokenizer


class Settings(Flags):
    prefix: Annotated[str, POSITIONAL]  # path of the corpus without .bin, .idx or .lang
    documents: Natural = 3  # documents to show
    characters: Natural = 400  # characters to show of each run
    json: bool = False  # print one JSON object instead of text
    tokenizer_type: Literal["HuggingFaceTokenizer", "SentencePieceTokenizer"] | None = None  # tokenizer library
    tokenizer_model: str | None = None  # folder with tokenizer.json, or a SentencePiece .model file

    def __post_init__(self) -> None:
        if bool(self.tokenizer_type) != bool(self.tokenizer_model):
            raise UserError("--tokenizer-type and --tokenizer-model require each other; pass both or neither")
        for suffix in (".bin", ".idx", ".lang", ".manifest.json"):
            self.prefix = self.prefix.removesuffix(suffix)


def main(arguments: Settings) -> None:
    corpus = Corpus(arguments.prefix)
    summary = summarize(corpus, corpus.verify())
    tokenizer = None
    if arguments.tokenizer_type and arguments.tokenizer_model:
        tokenizer = load_tokenizer(arguments.tokenizer_type, arguments.tokenizer_model)
        if summary["largest_id"] >= tokenizer.vocab_size:
            raise UserError(
                f"{corpus.paths.bin} contains token ID {summary['largest_id']:,}, but {arguments.tokenizer_model} ends "
                f"at {tokenizer.vocab_size - 1:,}; pass the tokenizer that the corpus was made with"
            )
    num_shown = min(arguments.documents, corpus.num_documents)
    shown = [show_document(corpus, index, tokenizer, arguments.characters) for index in range(num_shown)]
    if arguments.json:
        print(json.dumps(summary | {"shown": shown}, ensure_ascii=False, indent=2))
        return
    print_summary(summary)
    for number, document in enumerate(shown, start=1):
        print_document(document, number, corpus.num_documents)
    print(f"\nThe files agree: {', '.join(summary['verified'])}.")


def summarize(corpus: Corpus, manifest: Manifest | None) -> dict[str, Any]:
    """Return what --json prints, except the documents."""
    lengths = corpus.document_lengths
    num_tokens, num_original = corpus.bits.num_tokens, corpus.bits.num_original
    return {
        "prefix": corpus.prefix,
        "files": {path.suffix[1:]: path.stat().st_size for path in corpus.paths},
        "dtype": corpus.tokens.dtype.name,
        "largest_id": int(corpus.tokens.max()) if num_tokens else -1,
        "sequences": len(corpus.sequence_lengths),
        "documents": corpus.num_documents,
        "empty_documents": int((lengths == 0).sum()),
        "tokens": num_tokens,
        "original_tokens": num_original,
        "expanded_tokens": num_tokens - num_original,
        **({} if corpus.loss_bits is None else {"assistant_tokens": corpus.loss_bits.num_original}),
        "tokens_per_document": {
            "shortest": int(lengths.min()),
            "median": float(np.median(lengths)),
            "mean": float(lengths.mean()),
            "percentile_95": float(np.percentile(lengths, 95)),
            "longest": int(lengths.max()),
        }
        if len(lengths)
        else {},
        "manifest": manifest and manifest.as_json(),
        "verified": ["sizes", "offsets", "token count", "checksum of the .lang"]
        + (["checksums of all files", "counts per language"] if manifest else []),
    }


@reports_panics()
def show_document(corpus: Corpus, index: int, tokenizer: Tokenizer | None, characters: int) -> dict[str, Any]:
    """Return a document's runs of one language bit, each with its first characters."""
    ids, bits = corpus.document(index)
    edges = run_edges(bits).tolist()
    shown = []
    for start, stop in zip(edges[:-1], edges[1:], strict=True):
        # A printed token has at least one character, so this many tokens are enough.
        first = ids[start : min(stop, start + characters)].tolist()
        text = tokenizer.decode(first) if tokenizer else " ".join(map(str, first))
        bit = "original" if bits[start] else "expanded"
        is_cut = len(text) > characters or len(first) < stop - start
        shown.append({"bit": bit, "from": start + 1, "to": stop, "text": text[:characters], "is_cut": is_cut})
    return {"tokens": len(ids), "runs": shown}


def print_summary(summary: dict[str, Any]) -> None:
    contents = {
        "bin": f"{summary['dtype']} token IDs, the largest {summary['largest_id']:,}",
        "idx": f"{summary['sequences']:,} sequences",
        "lang": "language bits",
    }
    print(summary["prefix"])
    for name, content in contents.items():
        print(f"  .{name:<5}{format_bytes(summary['files'][name]):>12}   {content}")
    manifest, num_tokens, empty = summary["manifest"], summary["tokens"], summary["empty_documents"]
    if manifest:
        tokenizer = manifest["tokenizer"]
        end = f", ended by token {tokenizer['eod_id']}" if manifest["append_eod"] else ""
        sources = f"{len(manifest['sources']):,} source{'' if len(manifest['sources']) == 1 else 's'}"
        print(printable(f"  made with {tokenizer['type']} {tokenizer['model']}{end}, from {sources}"))
    else:
        print("  no manifest: the token IDs can't be verified, and the tokenizer is unknown")
    print(f"\n  {'documents':<20}{summary['documents']:>15,}" + (f"   {empty:,} empty" if empty else ""))
    print(f"  {'tokens':<20}{num_tokens:>15,}")
    for bit in ("original", "expanded"):
        count = summary[f"{bit}_tokens"]
        print(f"    {bit + '-language':<18}{count:>15,}   {count / max(num_tokens, 1):6.1%}")
    if (counted := summary.get("assistant_tokens")) is not None:
        print(f"    {'of the assistant':<18}{counted:>15,}   {counted / max(num_tokens, 1):6.1%}   count in the loss")
    if manifest and manifest["languages"]:
        rows = []
        by_bit = sorted(manifest["languages"].items(), key=lambda item: (item[1]["bit"] != "original", item[0]))
        for name, count in by_bit:
            documents, tokens, num_bytes = count["documents"], count["tokens"], count["bytes"]
            # Sampling loses the size of the text.
            density = f"{num_bytes / tokens:.2f}" if tokens and num_bytes else "–"
            share = f"{tokens / max(num_tokens, 1):.1%}"
            rows.append([name, count["bit"], f"{documents:,}", f"{tokens:,}", share, density])
        head = ["language", "bit", "documents", "tokens", "share", "bytes/token"]
        print(f"\n{table_text(head, rows, (0, 1), indent='  ')}")
    if summary["tokens_per_document"]:
        print("\n  tokens per document")
        for name, value in summary["tokens_per_document"].items():
            print(f"    {'95th percentile' if name == 'percentile_95' else name:<18}{value:>15,.0f}")


def print_document(document: dict[str, Any], number: int, num_documents: int) -> None:
    tokens = document["tokens"]
    print(f"\ndocument {number:,} of {num_documents:,}, {tokens:,} token{'' if tokens == 1 else 's'}")
    for run in document["runs"]:
        label = f"  [{run['bit']} {run['from']:,}–{run['to']:,}] "
        text = run["text"] + (" …" if run["is_cut"] else "")
        # Control characters and line breaks would break the layout.
        text = printable(text)
        print(textwrap.fill(label + text, width=110, subsequent_indent="    ", break_on_hyphens=False))


if __name__ == "__main__":
    run_script(main)
