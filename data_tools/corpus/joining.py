"""Several corpora that become one: whether they can be joined, and the manifest of the result."""

import dataclasses
import os
from collections.abc import Iterable, Sequence

from data_tools.corpus.corpus import Corpus
from moelpr.base.errors import UserError
from moelpr.base.machine import allow_open_files
from moelpr.data.manifest import FileRecord, LanguageCount, Manifest, Source, TokenizerRecord, manifest_path


def open_corpora(prefixes: Sequence[str]) -> tuple[list[Corpus], list[Manifest] | None]:
    """Open several corpora, read all of them, and check that they can be joined.

    Returns:
        The corpora, and their manifests; None if one of them has no manifest.

    Raises:
        UserError: A corpus is damaged, or two have different tokenizers or different bits for one language.
    """
    allow_open_files()
    corpora = [Corpus(prefix) for prefix in prefixes]
    manifests = [corpus.verify() for corpus in corpora]
    described = [
        (prefix, manifest) for prefix, manifest in zip(prefixes, manifests, strict=True) if manifest is not None
    ]
    bits: dict[str, tuple[str, str]] = {}  # language -> its first corpus, and its bit there
    for prefix, manifest in described:
        _compare_tokenizers(*described[0], prefix, manifest)
        for language, count in manifest.languages.items():
            other_prefix, other_bit = bits.setdefault(language, (prefix, count.bit))
            if count.bit != other_bit:
                raise UserError(
                    f"{language} is an {other_bit} language in {other_prefix}, but an {count.bit} one in {prefix}; "
                    "preprocess one of them again"
                )
    first = corpora[0].tokens.dtype
    if len({corpus.loss_bits is None for corpus in corpora}) > 1:
        raise UserError(f"only some of {', '.join(prefixes)} are conversations; keep them in separate corpora")
    for corpus in corpora:
        if corpus.tokens.dtype != first:
            raise UserError(
                f"{corpus.paths.bin} contains {corpus.tokens.dtype.name}, but {corpora[0].paths.bin} contains "
                f"{first.name}; join corpora of one tokenizer"
            )
    return corpora, [manifest for _, manifest in described] if len(described) == len(corpora) else None


def check_same_job(prefixes: Sequence[str], manifests: Sequence[Manifest]) -> None:
    """Raise `UserError` if shards were not made by the same command from the same input: documents would be missing."""
    for prefix, manifest in zip(prefixes, manifests, strict=True):
        if manifest.shard_of != manifests[0].shard_of:
            raise UserError(
                f"{prefixes[0]} and {prefix} are shards of different jobs: their flags differ, or the names or sizes "
                "of their input files; preprocess all shards again, from the same input"
            )


def _compare_tokenizers(prefix: str, manifest: Manifest, other_prefix: str, other: Manifest) -> None:
    def identity(tokenizer: TokenizerRecord) -> tuple[object, ...]:
        # The path of the tokenizer does not matter.
        return tokenizer.type, tokenizer.fingerprint, tokenizer.vocabulary_sha256, tokenizer.special_tokens

    if identity(manifest.tokenizer) != identity(other.tokenizer):
        raise UserError(
            f"{prefix} was made with the tokenizer {manifest.tokenizer.model}, {other_prefix} with another, "
            f"{other.tokenizer.model}; tokenize both with the same one"
        )
    if manifest.append_eod != other.append_eod or manifest.tokenizer.eod_id != other.tokenizer.eod_id:
        raise UserError(
            f"the documents of {prefix} and {other_prefix} end in different tokens; tokenize both with or both without "
            "--append-eod"
        )


def merge_manifests(manifests: Sequence[Manifest], files: dict[str, FileRecord]) -> Manifest:
    """Return the manifest of concatenated corpora, whose files are `files`.

    A source that is in several of them (shards of one job share their input) is listed once.
    """
    sources: dict[object, Source] = {}
    languages: dict[str, LanguageCount] = {}
    for manifest in manifests:
        for source in manifest.sources:
            key = source.path, source.bytes, source.sha1, source.version
            sources.setdefault(key, dataclasses.replace(source, documents=0)).documents += source.documents
        for name, count in manifest.languages.items():
            languages.setdefault(name, LanguageCount(count.bit)).add(count.documents, count.tokens, count.bytes)
    return Manifest(
        tokenizer=manifests[0].tokenizer,
        append_eod=manifests[0].append_eod,
        sources=list(sources.values()),
        languages=dict(sorted(languages.items())),
        documents=sum(manifest.documents for manifest in manifests),
        tokens=sum(manifest.tokens for manifest in manifests),
        skipped_lines=sum(manifest.skipped_lines for manifest in manifests),
        files=files,
        filter=manifests[0].filter if len({manifest.filter for manifest in manifests}) == 1 else None,
        filtered_documents=sum(manifest.filtered_documents for manifest in manifests),
    )


def missing_manifests(corpora: Sequence[Corpus], output_prefix: str) -> str:
    """Return a note on why the output has no manifest."""
    missing = [corpus.prefix for corpus in corpora if not manifest_path(corpus.prefix).exists()]
    verb = "has" if len(missing) == 1 else "have"
    return f"note: {', '.join(missing)} {verb} no manifest, so {output_prefix} gets none"


def refuse_input_as_output(inputs: Iterable[str], output: str) -> None:
    """Raise `UserError` if a corpus would be written over one that it is made of."""
    if os.path.realpath(output) in map(os.path.realpath, inputs):
        raise UserError(f"--output-prefix {output} is one of the inputs; choose another name")
