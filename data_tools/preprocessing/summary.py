"""Counts of a job, and the report that it prints of them in the end."""

import sys
from collections import Counter
from dataclasses import dataclass, field
from pathlib import Path

from data_tools.corpus.corpus import describe
from data_tools.corpus.tokenized import token_dtype
from data_tools.preprocessing.settings import KEPT
from data_tools.preprocessing.tagging import LanguageGroups
from moelpr.base.text_tables import table_text
from moelpr.data.manifest import LanguageCount, Manifest
from moelpr.data.text.language_id import UNDETECTED

_PROBLEMS_SHOWN = 10


@dataclass
class CorpusTally:
    """Counts of one corpus.

    Attributes:
        languages: Counts by language name.
        sources: Number of documents by input file.
        num_empty: Number of documents without tokens.
    """

    languages: dict[str, LanguageCount] = field(default_factory=dict)
    sources: Counter[str] = field(default_factory=Counter)
    num_empty: int = 0

    def language(self, name: str, groups: LanguageGroups) -> LanguageCount:
        """Return the counts of a language, creating them if necessary."""
        if name not in self.languages:
            self.languages[name] = LanguageCount(groups.bit(name))
        return self.languages[name]

    def add(self, other: "CorpusTally") -> None:
        for name, count in other.languages.items():
            self.languages.setdefault(name, LanguageCount(count.bit)).add(count.documents, count.tokens, count.bytes)
        self.sources.update(other.sources)
        self.num_empty += other.num_empty


@dataclass
class Tally:
    """Counts of a job.

    Attributes:
        corpora: Counts by the corpus's name within the job.
        num_read: Number of lines or rows, including malformed but not blank ones.
        num_skipped: Number of malformed lines or rows.
        num_long: Number of documents left out because they are too long.
        num_undetected: Number of documents omitted because their language is uncertain.
        num_filtered: Number of documents omitted by --filter.
        problems: Messages about the first malformed lines and long documents.
        audit: Number of documents by stated and detected language.
    """

    corpora: dict[str, CorpusTally] = field(default_factory=dict)
    num_read: int = 0
    num_skipped: int = 0
    num_long: int = 0
    num_undetected: int = 0
    num_filtered: int = 0
    problems: list[str] = field(default_factory=list)
    audit: dict[str, Counter[str]] = field(default_factory=dict)

    def corpus(self, name: str) -> CorpusTally:
        return self.corpora.setdefault(name, CorpusTally())

    def add(self, other: "Tally") -> None:
        for name, corpus in other.corpora.items():
            self.corpus(name).add(corpus)
        self.num_read += other.num_read
        self.num_skipped += other.num_skipped
        self.num_long += other.num_long
        self.num_undetected += other.num_undetected
        self.num_filtered += other.num_filtered
        self.problems += other.problems[: _PROBLEMS_SHOWN - len(self.problems)]
        for stated, detected in other.audit.items():
            self.audit.setdefault(stated, Counter()).update(detected)


def why_empty(sources: list[str], tally: Tally, tokenizer_model: str) -> str:
    """Return why the input gives no tokens."""
    label = ", ".join(sources[:5]) + (f" and {len(sources) - 5:,} more" if len(sources) > 5 else "")
    documents = sum(sum(corpus.sources.values()) for corpus in tally.corpora.values())
    if any(count.bytes for corpus in tally.corpora.values() for count in corpus.languages.values()):
        return (
            f"--tokenizer-model {tokenizer_model} produced no tokens for any of the {documents:,} documents of {label}"
            "; check that this tokenizer covers their language"
        )
    if tally.problems:
        number = tally.num_skipped + tally.num_long
        return f"{label} contains no usable document, {number:,} lines were skipped (first: {tally.problems[0]})"
    if tally.num_filtered and not documents:
        return f"--filter drops all {tally.num_filtered:,} documents of {label}; check its keys and values"
    contents = f"{documents:,} documents without any text" if documents else "no documents"
    return f"{label} contains {contents}"


def print_summary(
    manifests: dict[str, Manifest],
    prefixes: dict[str, str],
    tally: Tally,
    groups: LanguageGroups,
    skipped_path: Path,
    *,
    shows_languages: bool,
    names_original: bool,
) -> None:
    """Print what was written (manifests and prefixes by the corpus's name), and what a user should know about it.

    `names_original`: the original languages are named, so that every language has a bit, also a detected one.
    """
    for name, manifest in manifests.items():
        original = sum(count.tokens for count in manifest.languages.values() if count.bit == "original")
        dtype = token_dtype(manifest.tokenizer.vocab_size)
        print(describe(prefixes[name], manifest.documents, manifest.tokens, original, dtype))
        if shows_languages:
            counts = sorted(manifest.languages.items(), key=lambda item: -item[1].tokens)
            rows = [[name, c.bit, f"{c.documents:,}", f"{c.tokens:,}", f"{c.bytes:,}"] for name, c in counts]
            head = ["language", "bit", "documents", "tokens", "bytes"]
            print(f"\n{table_text(head, rows, (0, 1), indent='  ')}\n")
    if shows_languages:
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
        _print_audit(tally.audit, groups if names_original else None)
        _warn_of_expanded(tally.audit.get(KEPT, Counter()), groups)
    if number := tally.num_skipped + tally.num_long:
        warning = f"warning: {number:,} lines were skipped ({number / tally.num_read:.2%}), listed in {skipped_path}:"
        print(warning, *(f"  {problem}" for problem in tally.problems), sep="\n", file=sys.stderr)
        if number > _PROBLEMS_SHOWN:
            print(f"  and {number - _PROBLEMS_SHOWN:,} more", file=sys.stderr)


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
