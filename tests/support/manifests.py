"""Manifests of corpora that are not there."""

from pathlib import Path

from moelpr.data.manifest import FileRecord, LanguageCount, Manifest, TokenizerRecord


def write_manifest(prefix: Path, tokens: int, documents: int = 1, **languages: LanguageCount) -> None:
    """Write the manifest of a corpus; it has `languages`, by default only new text."""
    prefix.parent.mkdir(parents=True, exist_ok=True)
    Manifest(
        tokenizer=TokenizerRecord("HuggingFaceTokenizer", "hf", 500, 0, True, "f", "v"),
        append_eod=True,
        sources=[],
        languages=languages or {"el": LanguageCount("expanded", documents, tokens, 1)},
        documents=documents,
        tokens=tokens,
        skipped_lines=0,
        files={name: FileRecord(1, "0", "") for name in ("bin", "idx", "lang")},
    ).write(prefix)
