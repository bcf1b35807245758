"""What the manifests of several corpora say together."""

import dataclasses
from collections.abc import Sequence

from data_tools.corpus import Corpus
from moelpr.data.manifest import FileRecord, LanguageCount, Manifest, Source, TokenizerRecord, manifest_path
from moelpr.errors import UserError


def read_manifests(corpora: Sequence[Corpus]) -> list[Manifest] | None:
    """Each corpus's manifest, after reading all of each corpus; None where one of them has none.

    Raises:
        UserError: a corpus is damaged, or two are of different tokenizers or the same language has another bit in each.
    """
    manifests = [corpus.verify() for corpus in corpora]
    there = [
        (corpus.prefix, manifest) for corpus, manifest in zip(corpora, manifests, strict=True) if manifest is not None
    ]
    for prefix, manifest in there[1:]:
        _compare(*there[0], prefix, manifest)
    found = [manifest for _, manifest in there]
    return found if len(found) == len(corpora) else None


def missing_manifests(corpora: Sequence[Corpus], output_prefix: str) -> str:
    """Why the output has no manifest."""
    missing = [corpus.prefix for corpus in corpora if not manifest_path(corpus.prefix).exists()]
    verb = "has" if len(missing) == 1 else "have"
    return f"note: {', '.join(missing)} {verb} no manifest, so {output_prefix} gets none"


def merged(manifests: Sequence[Manifest], files: dict[str, FileRecord]) -> Manifest:
    """The manifest of these corpora one after another, whose files are `files`.

    A source that several of them name (shards of one job share their input) is named once.
    """
    sources: dict[tuple[str, int | None, str | None], Source] = {}
    languages: dict[str, LanguageCount] = {}
    for manifest in manifests:
        for source in manifest.sources:
            known = sources.setdefault(
                (source.path, source.bytes, source.sha1), dataclasses.replace(source, documents=0)
            )
            known.documents += source.documents
        for name, count in manifest.languages.items():
            total = languages.setdefault(name, LanguageCount(count.bit))
            total.documents += count.documents
            total.tokens += count.tokens
            total.bytes += count.bytes
    return Manifest(
        tokenizer=manifests[0].tokenizer,
        append_eod=manifests[0].append_eod,
        sources=list(sources.values()),
        languages=languages,
        documents=sum(manifest.documents for manifest in manifests),
        tokens=sum(manifest.tokens for manifest in manifests),
        skipped_lines=sum(manifest.skipped_lines for manifest in manifests),
        files=files,
    )


def _compare(prefix: str, manifest: Manifest, other_prefix: str, other: Manifest) -> None:
    def identity(tokenizer: TokenizerRecord) -> tuple[object, ...]:
        # Where the tokenizer lay doesn't matter.
        return tokenizer.type, tokenizer.fingerprint, tokenizer.vocabulary_sha256, tokenizer.special_tokens

    if identity(manifest.tokenizer) != identity(other.tokenizer):
        raise UserError(
            f"{prefix} was made with the tokenizer {manifest.tokenizer.model}, {other_prefix} with another, "
            f"{other.tokenizer.model}; tokenize both with the same one"
        )
    if manifest.append_eod != other.append_eod or manifest.tokenizer.eod_id != other.tokenizer.eod_id:
        raise UserError(
            f"the documents of {prefix} and {other_prefix} do not end in the same token; tokenize both with or both "
            "without --append-eod"
        )
    for name in manifest.languages.keys() & other.languages.keys():
        bits = manifest.languages[name].bit, other.languages[name].bit
        if bits[0] != bits[1]:
            raise UserError(
                f"{name} is an {bits[0]} language in {prefix} and an {bits[1]} one in {other_prefix}; preprocess one "
                "of them again"
            )
