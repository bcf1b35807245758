"""The front matter of a model card (README.md), which the Hugging Face Hub reads."""

import re
from pathlib import Path
from typing import Any

from checkpoint_convert.hf.model_files import CARD_FILE
from moelpr.process.errors import UserError
from moelpr.store import yaml_files

_NORWEGIAN = "no"  # which is false in YAML 1.1 unless it is quoted


def split_card(text: str) -> tuple[dict[str, Any], str]:
    """Front matter and body of a card; the former is empty if there is none or it can't be read."""
    match = re.match(r"---\r?\n(.*?)\n---\r?\n", text, re.DOTALL)
    if match is None:
        return {}, text
    try:
        metadata = yaml_files.parse_mapping(match[1], "front matter of the model card")
    except UserError:
        metadata = {}
    languages = metadata.get("language")
    if isinstance(languages, list):
        metadata["language"] = [_NORWEGIAN if language is False else language for language in languages]
    elif languages is False:
        metadata["language"] = _NORWEGIAN
    return metadata, text[match.end() :]


def read_card(folder: Path) -> str | None:
    """The card of a model, if it has one."""
    path = folder / CARD_FILE
    return path.read_text(encoding="utf-8", errors="replace") if path.is_file() else None
