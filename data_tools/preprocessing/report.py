"""What a job says in the end."""

import sys
from pathlib import Path

from data_tools.corpus_writer import token_dtype
from data_tools.preprocessing.languages import Bits
from data_tools.preprocessing.plan import Plan
from data_tools.preprocessing.tally import PROBLEMS_SHOWN, Tally
from moelpr.data.manifest import Manifest


def no_text(names: list[str], tally: Tally) -> str:
    """Why there is nothing to write."""
    label = ", ".join(names[:5]) + (f" and {len(names) - 5:,} more" if len(names) > 5 else "")
    documents = sum(sum(corpus.sources.values()) for corpus in tally.corpora.values())
    if tally.num_skipped:
        first = tally.problems[0]
        return f"{label} holds no usable document, {tally.num_skipped:,} lines were skipped (first: {first})"
    if not documents:
        return f"{label} holds no documents"
    return f"{label} holds {documents:,} documents without any text"


def print_report(manifests: dict[str, Manifest], tally: Tally, plan: Plan, shows_languages: bool) -> None:
    """Say what was written, and what a reader would want to know about it."""
    bits = plan.encoder.bits
    for name, manifest in manifests.items():
        original = sum(count.tokens for count in manifest.languages.values() if count.bit == "original")
        share = original / max(manifest.tokens, 1)  # a shard may be empty
        dtype = token_dtype(manifest.tokenizer.vocab_size).name
        print(
            f"{Path(plan.prefixes[name])}.bin, .idx, .lang: {manifest.documents:,} documents, "
            f"{manifest.tokens:,} tokens ({share:.1%} original-language), {dtype}"
        )
        if shows_languages:
            _print_languages(manifest)
    if shows_languages:
        found = {language for manifest in manifests.values() for language in manifest.languages}
        for language in sorted((bits.original | bits.expanded) - found):
            print(f"note: no document is tagged {language}")
    if num_empty := sum(corpus.num_empty for corpus in tally.corpora.values()):
        print(f"note: {num_empty:,} documents are empty and hold no tokens")
    if tally.num_undetected:
        print(f"note: {tally.num_undetected:,} documents of uncertain language were left out")
    if tally.audit:
        _print_audit(tally, bits)
    if tally.num_skipped:
        _print_skipped(tally, plan.skipped_path)


def _print_languages(manifest: Manifest) -> None:
    print(f"\n  {'language':<16}{'bit':<12}{'documents':>12}{'tokens':>16}{'bytes':>18}")
    for name, count in sorted(manifest.languages.items(), key=lambda item: -item[1].tokens):
        print(f"  {name:<16}{count.bit:<12}{count.documents:>12,}{count.tokens:>16,}{count.bytes:>18,}")
    print()


def _print_audit(tally: Tally, bits: Bits) -> None:
    """Stated against detected languages, the documents of each pair."""
    total: dict[str, int] = {}
    for detected in tally.audit.values():
        for name, documents in detected.items():
            total[name] = total.get(name, 0) + documents
    columns = sorted(total, key=lambda name: (-total[name], name))[:8]
    print("\n  documents by the language stated and (across) the one detected")
    print(f"  {'':<16}" + "".join(f"{name:>10}" for name in columns) + f"{'others':>10}")
    for stated, detected in sorted(tally.audit.items()):
        others = sum(detected.values()) - sum(detected[name] for name in columns)
        cells = "".join(f"{detected[name]:>10,}" for name in columns)
        print(f"  {stated:<16}{cells}{others:>10,}")
    known = bits.original | bits.expanded
    differing = sum(
        documents
        for stated, detected in tally.audit.items()
        for name, documents in detected.items()
        if {stated, name} <= known and (stated in bits.original) != (name in bits.original)
    )
    documents = sum(total.values())
    print(
        f"  {differing:,} of {documents:,} documents ({differing / max(documents, 1):.2%}) would have the other bit\n"
    )


def _print_skipped(tally: Tally, skipped: Path) -> None:
    share = tally.num_skipped / tally.num_read
    print(f"warning: {tally.num_skipped:,} lines were skipped ({share:.2%}), listed in {skipped}:", file=sys.stderr)
    for problem in tally.problems:
        print(f"  {problem}", file=sys.stderr)
    if tally.num_skipped > PROBLEMS_SHOWN:
        print(f"  and {tally.num_skipped - PROBLEMS_SHOWN:,} more", file=sys.stderr)
