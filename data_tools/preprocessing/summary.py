"""The report that a preprocessing job prints in the end."""

import sys
from collections import Counter

from data_tools.corpus.corpus import describe
from data_tools.corpus.tokenized import token_dtype
from data_tools.preprocessing.encode import PROBLEMS_SHOWN
from data_tools.preprocessing.job import Job
from data_tools.preprocessing.settings import KEPT
from data_tools.preprocessing.tagging import LanguageGroups
from moelpr.base.text_tables import table_text
from moelpr.data.language_bits import LanguageBits, loss_bits_path
from moelpr.data.text.language_id import UNDETECTED


def print_summary(job: Job) -> None:
    """Print what a job has written, and what a user should know about it."""
    args, outputs, groups = job.spec.args, job.spec.outputs, job.spec.encoder.groups
    tally, manifests = job.state.tally, job.state.manifests
    for name, manifest in manifests.items():
        original = sum(count.tokens for count in manifest.languages.values() if count.bit == "original")
        dtype = token_dtype(manifest.tokenizer.vocab_size)
        print(describe(outputs.corpora[name], manifest.documents, manifest.tokens, original, dtype))
        if not args.language:
            counts = sorted(manifest.languages.items(), key=lambda item: -item[1].tokens)
            rows = [[name, c.bit, f"{c.documents:,}", f"{c.tokens:,}", f"{c.bytes:,}"] for name, c in counts]
            head = ["language", "bit", "documents", "tokens", "bytes"]
            print(f"\n{table_text(head, rows, (0, 1), indent='  ')}\n")
    if not args.language:
        languages = {language for manifest in manifests.values() for language in manifest.languages}
        for language in sorted((groups.original | groups.expanded) - languages):
            print(f"note: no document is tagged {language}")
    if num_empty := sum(corpus.num_empty for corpus in tally.corpora.values()):
        print(f"note: {num_empty:,} documents are empty and contain no tokens")
    if tally.num_undetected:
        print(f"note: {tally.num_undetected:,} documents of uncertain language were omitted")
    if tally.num_filtered:
        print(f"note: --filter dropped {tally.num_filtered:,} of {tally.num_read:,} documents")
    if tally.audit:
        # If no original language is named, that of a detected language is unknown.
        _print_audit(tally.audit, groups if args.original_languages else None)
        _warn_of_expanded(tally.audit.get(KEPT, Counter()), groups)
    if number := tally.num_skipped + tally.num_long:
        share = f"{number / tally.num_read:.2%}"
        warning = f"warning: {number:,} lines were skipped ({share}), listed in {outputs.skipped_path}:"
        print(warning, *(f"  {problem}" for problem in tally.problems), sep="\n", file=sys.stderr)
        if number > PROBLEMS_SHOWN:
            print(f"  and {number - PROBLEMS_SHOWN:,} more", file=sys.stderr)
    for prefix in outputs.corpora.values() if args.conversations else ():
        bits = LanguageBits(loss_bits_path(prefix))
        share = f"{bits.num_original / max(bits.num_tokens, 1):.1%}"
        print(f"{bits.path}: {bits.num_original:,} tokens ({share}) are the assistant's and count in the loss")
    for path in outputs.texts.values():
        print(f"{path}: the held-out text as JSON lines")


def _warn_of_expanded(detected: Counter[str], groups: LanguageGroups) -> None:
    """Print how much of the kept text is in an expanded language, which the routers would hold back too."""
    numbers = {language: detected[language] for language in groups.expanded if detected[language]}
    if numbers:
        number, total, names = sum(numbers.values()), detected.total(), ", ".join(sorted(numbers))
        print(
            f"warning: {number:,} of {total:,} kept documents ({number / total:.1%}) seem to be in expanded languages "
            f"({names}), which the new experts should get; leave them out",
            file=sys.stderr,
        )


def _print_audit(audit: dict[str, Counter[str]], groups: LanguageGroups | None) -> None:
    """Print the number of documents of each stated (rows) and detected (columns) language.

    `groups`: None if that of a detected language is unknown.
    """
    total: Counter[str] = sum(audit.values(), Counter())
    columns = sorted(total, key=lambda name: (-total[name], name))[:8]
    print("\n  documents by stated language (rows) and detected language (columns)")
    rows = []
    differing = 0
    for stated, detected in sorted(audit.items()):
        others = detected.total() - sum(detected[name] for name in columns)
        rows.append([stated, *(f"{detected[name]:,}" for name in columns), f"{others:,}"])
        if groups is not None and "+" not in stated:  # a text in several languages may have both bits
            is_original = stated in groups.original
            certain = {name: count for name, count in detected.items() if name != UNDETECTED}
            differing += sum(count for name, count in certain.items() if (name in groups.original) != is_original)
    print(table_text(["", *columns, "others"], rows, indent="  "))
    if groups is not None:
        share = differing / max(total.total(), 1)
        print(f"  {differing:,} of {total.total():,} documents ({share:.2%}) would have the other bit")
    print()
