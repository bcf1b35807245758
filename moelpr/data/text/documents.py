"""Documents as JSON lines: one object per line, and a message for everything that can be wrong with a line."""

import functools
import json
from typing import Any

_BYTE_ORDER_MARK = b"\xef\xbb\xbf"
# The remedy for a line that is unusable, as a flag and as a key of a project.
FIX_OR_SKIP = "fix the line, or pass --on-error skip (in languages.yaml, steps: {preprocess: {on-error: skip}})"


class BadLine(Exception):
    """Why a line is unusable; the caller adds the file and the line number."""


def is_blank(line: bytes) -> bool:
    """Whether a line contains only white space, perhaps after a byte order mark."""
    return not line or line.isspace() or (line.startswith(_BYTE_ORDER_MARK) and is_blank(line[3:]))


def parse(line: bytes, keys: list[str]) -> dict[str, Any]:
    """The JSON object of a line, of which `keys` will be read.

    Raises:
        BadLine: the line is not a JSON object, or contains one of the keys twice.
    """
    line = line.rstrip(b"\r\n").removeprefix(_BYTE_ORDER_MARK)
    try:
        document = json.loads(line.decode("utf-8"))
        for key in keys:
            if line.count(_quoted(key)) > 1:
                json.loads(line, object_pairs_hook=lambda pairs: _reject_duplicates(pairs, keys))
    except UnicodeDecodeError as error:
        raise BadLine(f"invalid UTF-8 at byte {error.start + 1} of the line") from None
    except json.JSONDecodeError as error:
        if b"\0" in line:
            raise BadLine("NUL bytes, as in a truncated file") from None
        if line.strip() in (b"[", b"{"):
            raise BadLine("the start of an object or array of several lines; write one object per line") from None
        raise BadLine(f"not JSON ({error.msg} at character {error.pos + 1})") from None
    except (ValueError, RecursionError) as error:  # a number with too many digits, brackets nested too deeply
        raise BadLine(f"not usable JSON ({error})") from None
    if not isinstance(document, dict):
        hint = "; write one object per line instead of an array" if line.startswith(b"[") else ""
        raise BadLine(f"expected a JSON object, found {json_type(document)}{hint}")
    return document


def text_of(document: dict[str, Any], key: str) -> str:
    """The text under a key.

    Raises:
        BadLine: the key is missing, or its value is not a valid string.
    """
    if key not in document:
        raise BadLine(f'the key "{key}" is missing')
    text = document[key]
    if not isinstance(text, str):
        raise BadLine(f'the key "{key}" contains {json_type(text)}, not a string')
    if not text.isascii():
        try:
            text.encode("utf-8")
        except UnicodeEncodeError as error:  # "\ud800" is valid JSON but not a character
            raise BadLine(f'the key "{key}" contains half a surrogate pair at character {error.start + 1}') from None
    return text


def json_type(value: object) -> str:
    """The name of a JSON value's type, with its article."""
    if value is None:
        return "null"
    names = {bool: "a boolean", int: "a number", float: "a number", str: "a string", list: "a list", dict: "an object"}
    return names.get(type(value), "a value of another type")  # tables can contain bytes and dates


@functools.cache
def _quoted(key: str) -> bytes:
    return json.dumps(key, ensure_ascii=False).encode()


def _reject_duplicates(pairs: list[tuple[str, Any]], keys: list[str]) -> dict[str, Any]:
    names = [name for name, _ in pairs]
    for key in keys:
        if names.count(key) > 1:
            raise BadLine(f'the key "{key}" occurs twice')
    return dict(pairs)
