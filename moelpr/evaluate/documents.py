"""Held-out text: JSON lines in, documents out. Every complaint names the file and the line."""

import json
from pathlib import Path

from moelpr.errors import UserError


def read_documents(path: Path, json_key: str = "text", max_documents: int | None = None) -> list[str]:
    """The text under `json_key` of each line of `path`, at most `max_documents` of them; blank lines are skipped.

    Raises UserError for a missing or empty file, invalid UTF-8, a malformed line, a missing key and an empty text.
    """
    documents: list[str] = []
    try:
        with open(path, "rb") as lines:
            for number, line in enumerate(lines, start=1):
                if len(documents) == max_documents:
                    break
                if line.strip():
                    documents.append(_document(line, json_key, f"{path}, line {number}"))
    except (FileNotFoundError, IsADirectoryError, PermissionError) as error:
        raise UserError(f"{path} cannot be read ({error.strerror}); give a file of JSON lines") from error
    if not documents:
        raise UserError(f"{path} holds no documents; give a file with one JSON object a line")
    return documents


def _document(line: bytes, json_key: str, place: str) -> str:
    try:
        record = json.loads(line.decode("utf-8"))
    except UnicodeDecodeError as error:
        raise UserError(f"{place} is not UTF-8 ({error.reason} at byte {error.start}); convert the file") from error
    except json.JSONDecodeError as error:
        raise UserError(f"{place} is not JSON ({error.msg} at column {error.colno}); fix or remove the line") from error
    if not isinstance(record, dict) or json_key not in record:
        found = f"keys {', '.join(record)}" if isinstance(record, dict) and record else type(record).__name__
        raise UserError(f'{place} has no "{json_key}" (found: {found}); name the key of the text with --json-key')
    text = record[json_key]
    if not isinstance(text, str):
        raise UserError(
            f'{place}: "{json_key}" is {type(text).__name__}, wanted text; name another key with --json-key'
        )
    if not text:
        raise UserError(f'{place}: "{json_key}" is empty, so there are no bytes to count; remove the line')
    try:
        text.encode("utf-8")
    except UnicodeEncodeError as error:
        raise UserError(f"{place} holds half of a surrogate pair, which is no character; fix the line") from error
    return text
