"""Lines as real crawls contain them: valid ones are read, and every other one gets a message with its place."""

from pathlib import Path

import pytest

from moelpr.process.errors import UserError
from moelpr.store.documents import BadLine, parse, read_documents, text_of


@pytest.mark.parametrize(
    "line, message",
    [
        (b'{"text": "a", "text": "b"}', 'the key "text" occurs twice'),
        (b'{"text": "a", "text": "a"}', 'the key "text" occurs twice'),
        (b'{"text": "a\0b"}', "NUL bytes"),
        (b"\0" * 50, "NUL bytes"),
        (b'{"text": "caf\xe9"}', "invalid UTF-8 at byte 14 of the line"),
        (b'{"text": "\xed\xa0\x80"}', "invalid UTF-8 at byte 11 of the line"),
        (b'{"text": "a', "not JSON .Unterminated string"),
        (b"{'text': 'a'}", "not JSON"),
        (b'"text"', "expected a JSON object, found a string"),
        (b"1" * 5000, "not usable JSON"),
    ],
)
def test_a_malformed_line_has_a_message(line: bytes, message: str) -> None:
    with pytest.raises(BadLine, match=message):
        parse(line, ["text"])


def test_unusual_lines_that_are_documents() -> None:
    assert parse(b'\xef\xbb\xbf{"text": "a"}\r\n', ["text"]) == {"text": "a"}
    assert text_of(parse(b'{"text": "a\\u0000b"}', ["text"]), "text") == "a\0b"
    assert text_of(parse(b'{"text": "\\ud83d\\ude42 ok"}', ["text"]), "text") == "🙂 ok"
    # Twice, but not the requested key, or not as a key.
    assert parse(b'{"text": "a", "n": 1, "n": 2}', ["text"])["n"] == 2
    assert parse(rb'{"text": "say \"text\" and \"text\""}', ["text"])["text"] == 'say "text" and "text"'
    assert parse(b'{"text": "a", "tags": ["text"]}', ["text"])["text"] == "a"


@pytest.mark.parametrize(
    "document, message",
    [
        ({}, 'the key "text" is missing'),
        ({"text": None}, 'the key "text" contains null, not a string'),
        ({"text": True}, "contains a boolean"),
        ({"text": ["a"]}, "contains a list"),
        ({"text": {}}, "contains an object"),
        ({"text": b"a"}, "contains a value of another type"),
        ({"text": "ab\udc80"}, 'the key "text" contains half a surrogate pair at character 3'),
    ],
)
def test_a_document_without_a_text_has_a_message(document: dict, message: str) -> None:
    with pytest.raises(BadLine, match=message):
        text_of(document, "text")


def test_an_array_around_the_documents_gets_a_hint() -> None:
    with pytest.raises(BadLine, match="one object per line"):
        parse(b'[{"text": "a"}]', ["text"])


def test_read_documents_returns_texts_in_order_up_to_the_limit(tmp_path: Path) -> None:
    path = tmp_path / "a.jsonl"
    path.write_text('{"text": "one"}\n\n{"text": "two", "x": 1}\n{"text": "three"}')
    assert read_documents(path) == ["one", "two", "three"]
    assert read_documents(path, max_documents=2) == ["one", "two"]
    with pytest.raises(UserError, match='line 1 has no key "x" .keys: text.; .*--json-key'):
        read_documents(path, json_key="x")


@pytest.mark.parametrize(
    ("line", "message"),
    [
        (b'{"text": "half', "not JSON"),
        (b'{"txt": "no"}', 'no key "text" .keys: txt.*--json-key'),
        (b'{"text": 5}', "a number"),
        (b'{"text": ""}', "empty"),
    ],
)
def test_read_documents_names_the_malformed_line(tmp_path: Path, line: bytes, message: str) -> None:
    path = tmp_path / "a.jsonl"
    path.write_bytes(b'{"text": "good"}\n' + line + b"\n")
    with pytest.raises(UserError, match=f"{path}, line 2.*{message}"):
        read_documents(path)


def test_missing_and_empty_files_are_rejected(tmp_path: Path) -> None:
    for path in (tmp_path / "missing.jsonl", tmp_path):
        with pytest.raises(UserError, match=f"cannot read {path}"):
            read_documents(path)
    (tmp_path / "empty.jsonl").write_text("\n")
    with pytest.raises(UserError, match="empty.jsonl contains no documents"):
        read_documents(tmp_path / "empty.jsonl")
