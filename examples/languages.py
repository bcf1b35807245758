"""The languages of all examples, those of the paper, and their held-out text."""

from collections.abc import Iterable
from pathlib import Path

ORIGINAL, EXPANDED = ("en", "es", "zh"), ("el", "hu", "tr")
LANGUAGES = (*ORIGINAL, *EXPANDED)
GROUPS = {"original": ORIGINAL, "expanded": EXPANDED}


def held_out_files(corpus: Path, kinds: Iterable[str] = ()) -> dict[str, Path]:
    """Return the files of a corpus's held-out text by language ("el") or, if it has kinds, by both ("el.manuals")."""
    if not kinds:
        return {language: corpus / f"validation.{language}.jsonl" for language in LANGUAGES}
    return {f"{x}.{kind}": corpus / f"held-out.{kind}.{x}.jsonl" for kind in kinds for x in LANGUAGES}
