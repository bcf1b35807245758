"""Lines as real crawls contain them: valid ones are read, and every other one gets a message with its place."""

import pytest

from moelpr.data.text.documents import BadLine, parse, text_of


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
