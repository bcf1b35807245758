"""The languages of all examples, those of the paper, and their held-out text."""

from pathlib import Path

ORIGINAL, EXPANDED = ("en", "es", "zh"), ("el", "hu", "tr")
LANGUAGES = (*ORIGINAL, *EXPANDED)
GROUPS = {"original": ORIGINAL, "expanded": EXPANDED}


def held_out_files(corpus: Path) -> dict[str, Path]:
    """Return the files of the demo's held-out text by language."""
    return {language: corpus / f"validation.{language}.jsonl" for language in LANGUAGES}
